import json

from typer.testing import CliRunner

from flows.cli.main import app


def test_published_weights_are_listed_with_where_they_would_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sam_vit_b_01ec64.pth").write_bytes(b"x")
    done = CliRunner().invoke(app, ["weights", "--json"])
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["folder"] == str(tmp_path / "models")
    assert {file["name"]: file["here"] for file in document["files"]} == {
        "sam_vit_b_01ec64.pth": True,
        "sam_vit_l_0b3195.pth": False,
        "sam_vit_h_4b8939.pth": False,
    }


def test_what_is_not_published_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["weights", "nobody.pth", "--json"])
    assert done.exit_code == 2
    assert "nobody.pth" in json.loads(done.stdout)["error"]


def test_a_file_that_is_there_but_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sam_vit_b_01ec64.pth").write_bytes(b"not weights")
    done = CliRunner().invoke(app, ["weights", "sam_vit_b_01ec64.pth", "--json"])
    assert done.exit_code == 1
    assert "sha256" in json.loads(done.stdout)["error"]
