"""Which folders Label Studio may show pictures from: its import storages for local files."""

from pathlib import Path, PurePosixPath

from loop.adapters.label_studio_http import Connection
from loop.errors import InputError


def connect_storage(connection: Connection, project_id: int, directory: Path | str) -> int:
    """Lets Label Studio show the pictures below `directory`; imports nothing. Returns the storage's number.

    Raises:
        InputError: the directory is not absolute.
        RefusedError: Label Studio does not see it, or it is not below the document root.
    """
    path = str(PurePosixPath(directory))
    if not PurePosixPath(path).is_absolute():
        raise InputError(f"{path} is relative; give the absolute path of the directory as Label Studio sees it")
    storages = connection.sdk.import_storage.local
    for storage in storages.list(project=project_id):
        if storage.path == path:
            return int(storage.id)
    return int(storages.create(project=project_id, path=path, use_blob_urls=True, title="celloop").id)


def storage_paths(connection: Connection, project_id: int) -> list[str]:
    """The folders that the project has a storage for, as Label Studio sees them."""
    return [str(storage.path) for storage in connection.sdk.import_storage.local.list(project=project_id)]
