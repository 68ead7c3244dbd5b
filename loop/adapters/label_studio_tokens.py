"""Legacy tokens of a Label Studio organization, switched on by its administrator's password.

A new organization has them off, and who has nothing but a legacy token cannot switch them on with it.
"""

import httpx
from pydantic import SecretStr

from loop.errors import RefusedError, UnreachableError

TIMEOUT_S = 60.0


def enable_legacy_tokens(url: str, email: str, password: SecretStr) -> None:
    """Logs in as a person does and allows legacy tokens beside personal access tokens; others' stay as they are.

    Args:
        url: of Label Studio.
        email: of an administrator.
        password: his.

    Raises:
        RefusedError: a wrong password, or he may not do this.
        UnreachableError: no answer.
    """
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as browser:
            browser.get("/user/login/").raise_for_status()
            token = browser.cookies.get("csrftoken")
            form = {"email": email, "password": password.get_secret_value(), "csrfmiddlewaretoken": token}
            logged_in = browser.post("/user/login/", data=form)
            if not logged_in.is_redirect:
                raise RefusedError(
                    f"Label Studio does not let {email} in with the password that celloop has; switch legacy tokens on "
                    "in Label Studio (Organization, Access Token Settings)"
                )
            headers = {"X-CSRFToken": browser.cookies.get("csrftoken") or ""}
            wanted = {"api_tokens_enabled": True, "legacy_api_tokens_enabled": True}
            browser.post("/api/jwt/settings", json=wanted, headers=headers).raise_for_status()
    except httpx.HTTPStatusError as error:
        status, path = error.response.status_code, error.request.url.path
        raise RefusedError(
            f"Label Studio at {url} answered {status} to {path}; an administrator of the organization can switch "
            "legacy tokens on (Organization, Access Token Settings)"
        ) from error
    except httpx.HTTPError as error:
        raise UnreachableError(
            f"nothing answers at {url} ({type(error).__name__}); start it with `celloop up`"
        ) from error
