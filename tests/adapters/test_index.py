import dataclasses
import errno
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from loop.adapters.index import AnnotationRow, AuditRow, ImageRow, Index, ProjectRow
from loop.adapters.index_tables import Base
from loop.errors import (
    ConfigError,
    InputError,
    LoopError,
    NonFiniteError,
    ServiceError,
    StateError,
    UnreachableError,
)

NOON = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'index.sqlite'}"


@pytest.fixture
def index(url):
    index = Index(url)
    index.add_project("cells", ls_project_id=7, root="/data", label_config="<View/>")
    yield index
    index.close()


def image(image_id: str, project_id: int = 1, **fields) -> ImageRow:
    known = {"sha256": "ab", "path": f"/data/{image_id}.tif", "display": f"cells/{image_id}.png"}
    return ImageRow(project_id, image_id, **(known | fields))


def annotation(number: int, image_id: str = "a", updated_at: datetime = NOON, **fields) -> AnnotationRow:
    return AnnotationRow(1, number, image_id, number + 100, updated_at, f"{number}.json", **fields)


class TestProjects:
    def test_a_project_is_found_by_name_and_by_label_studio_number(self, index):
        row = index.project("cells")
        assert row == ProjectRow(row.id, "cells", 7, "/data", "<View/>", created_at=row.created_at)
        assert index.project_by_label_studio(7) == row
        assert index.projects() == [row]
        assert abs((datetime.now(UTC) - row.created_at).total_seconds()) < 60

    def test_unknown_projects_are_refused_with_the_known_ones(self, index):
        index.add_project("wells", ls_project_id=8, root="/w", label_config="")
        with pytest.raises(StateError, match="no project 'cell'; known projects: cells, wells"):
            index.project("cell")
        with pytest.raises(StateError, match="number 9 in Label Studio; known projects: cells, wells"):
            index.project_by_label_studio(9)
        with pytest.raises(StateError, match="known projects"):
            index.add_images("nope", [])

    def test_before_the_first_project_the_text_says_how_to_make_one(self, url):
        with pytest.raises(StateError, match="celloop init"):
            Index(url).project("cells")

    def test_adding_again_updates_and_keeps_what_was_published(self, index):
        index.set_published("cells", "celloop-cells-v1-r1", "celloop-cells-v1")
        index.set_synced("cells", NOON)
        before = index.project("cells")
        assert index.add_project("cells", ls_project_id=7, root="/moved", label_config="<View/>") == (
            dataclasses.replace(before, root="/moved")
        )

    def test_a_new_project_in_label_studio_starts_unpublished_and_unsynced(self, index):
        index.set_published("cells", "celloop-cells-v1-r1", "celloop-cells-v1")
        index.set_synced("cells", NOON)
        row = index.add_project("cells", ls_project_id=11, root="/data", label_config="<View/>")
        assert (row.ls_project_id, row.published_version, row.published_model, row.synced_until) == (11, "", "", None)

    def test_two_projects_cannot_share_a_label_studio_project(self, index):
        with pytest.raises(StateError, match="project 7 belongs to 'cells', not to 'wells'"):
            index.add_project("wells", ls_project_id=7, root="/w", label_config="")
        assert [p.name for p in index.projects()] == ["cells"]


class TestTimes:
    def test_any_zone_in_utc_out_to_the_microsecond(self, index):
        east = timezone(timedelta(hours=5, minutes=30))
        index.set_synced("cells", datetime(2026, 3, 1, 17, 30, 0, 250_001, tzinfo=east))
        until = index.project("cells").synced_until
        assert until == datetime(2026, 3, 1, 12, 0, 0, 250_001, tzinfo=UTC)
        assert until.tzinfo is UTC

    def test_a_naive_time_is_refused(self, index):
        with pytest.raises(InputError, match="no time zone"):
            index.set_synced("cells", datetime(2026, 3, 1))
        assert index.project("cells").synced_until is None


class TestImages:
    def test_rows_come_back_as_given(self, index):
        rows = [
            image("b", task_id=3, group="slide 1", split="pool", modality="grey", height=4, width=5, role="control"),
            image("a", state="labelled", score=0.25, rank=1, reason="odd shapes", chosen_in=0),
        ]
        index.add_images("cells", rows)
        assert index.images("cells") == [rows[1], rows[0]]
        assert index.image("cells", "b") == rows[0]
        assert index.images("cells", role="control") == [rows[0]]
        assert index.images("cells", state="labelled", role="open") == [rows[1]]
        assert index.images("cells", state="gone") == []

    def test_a_second_import_keeps_what_the_loop_knows(self, index):
        index.add_images("cells", [image("a", task_id=3), image("b"), image("c")])
        index.set_images("cells", {"a": {"role": "control", "state": "labelled"}, "b": {"state": "gone"}})
        index.add_images("cells", [image("a", sha256="cd", height=9), image("b", task_id=4)])
        a, b, c = index.images("cells")
        assert a == image("a", sha256="cd", height=9, task_id=3, role="control", state="labelled")
        assert b == image("b", task_id=4, state="open")
        assert c == image("c")

    def test_different_fields_of_different_images_in_one_call(self, index):
        index.add_images("cells", [image(name) for name in "abc"])
        index.set_images("cells", {"a": {"score": 0.5, "rank": 1}, "b": {"state": "skipped"}, "c": {}})
        assert index.images("cells") == [image("a", score=0.5, rank=1), image("b", state="skipped"), image("c")]

    def test_an_unknown_image_changes_nothing(self, index):
        index.add_images("cells", [image("a")])
        with pytest.raises(StateError, match="no image x, y"):
            index.set_images("cells", {"a": {"rank": 1}, "x": {"rank": 2}, "y": {"rank": 3}})
        with pytest.raises(StateError, match="no image 'x'"):
            index.image("cells", "x")
        assert index.images("cells") == [image("a")]

    @pytest.mark.parametrize(
        ("fields", "error", "text"),
        [
            ({"image_id": "b"}, InputError, "cannot change image_id; it can change sha256"),
            ({"colour": 1}, InputError, "cannot change colour"),
            ({"role": "holdout"}, InputError, "role='holdout' is not known; expected one of open, train, control"),
            ({"state": None}, InputError, "state=None is not known"),
            ({"score": float("nan")}, NonFiniteError, "image a: its score is nan"),
        ],
    )
    def test_wrong_fields_are_named(self, index, fields, error, text):
        index.add_images("cells", [image("a")])
        with pytest.raises(error, match=text):
            index.set_images("cells", {"a": fields})
        assert index.images("cells") == [image("a")]

    def test_wrong_rows_and_filters_are_named(self, index):
        with pytest.raises(InputError, match="project number 2 was given for project number 1"):
            index.add_images("cells", [image("a", project_id=2)])
        with pytest.raises(NonFiniteError, match="image a"):
            index.add_images("cells", [image("a", score=float("inf"))])
        with pytest.raises(InputError, match="state='done'"):
            index.images("cells", state="done")

    def test_projects_do_not_see_each_other(self, index):
        other = index.add_project("wells", ls_project_id=8, root="/w", label_config="").id
        index.add_images("cells", [image("a")])
        index.add_images("wells", [image("a", project_id=other, sha256="ff")])
        index.set_images("wells", {"a": {"rank": 5}})
        assert index.images("cells") == [image("a")]
        assert index.images("wells") == [image("a", project_id=other, sha256="ff", rank=5)]

    def test_ten_thousand_images_in_one_call(self, index):
        index.add_images("cells", [image(f"{i:05}") for i in range(10_000)])
        index.set_images("cells", {f"{i:05}": {"rank": i + 1} for i in range(10_000)})
        assert [row.rank for row in index.images("cells")] == list(range(1, 10_001))


class TestAnnotations:
    @pytest.fixture(autouse=True)
    def _images(self, index):
        index.add_images("cells", [image("a"), image("b")])

    def test_rows_come_back_as_given(self, index):
        rows = [annotation(1, n_regions=4, lead_time_s=3.5, completed_by=2), annotation(2, "b", cancelled=True)]
        index.put_annotations("cells", reversed(rows))
        assert index.annotations("cells") == rows

    def test_an_older_state_never_replaces_a_newer(self, index):
        newer = annotation(1, updated_at=NOON + timedelta(microseconds=1), n_regions=5)
        index.put_annotations("cells", [newer])
        index.put_annotations("cells", [annotation(1, n_regions=4)])
        assert index.annotations("cells") == [newer]

    def test_used_annotations_are_new_again_once_edited(self, index):
        index.put_annotations("cells", [annotation(1), annotation(2), annotation(3, cancelled=True)])
        assert index.new_annotations_since_last_round("cells") == 2
        index.set_used("cells", [1, 2, 3], 0)
        index.set_used("cells", [1, 2, 3], 1)
        assert [row.used_in_round for row in index.annotations("cells")] == [0, 0, 0]
        index.put_annotations("cells", [annotation(1), annotation(2, updated_at=NOON + timedelta(seconds=1))])
        assert [row.used_in_round for row in index.annotations("cells")] == [0, None, 0]
        assert index.new_annotations_since_last_round("cells") == 1

    def test_a_round_given_with_the_row_is_kept(self, index):
        index.put_annotations("cells", [annotation(1, used_in_round=2)])
        index.put_annotations("cells", [annotation(1)])
        assert index.annotations("cells")[0].used_in_round == 2

    def test_dropping_is_repeatable(self, index):
        index.put_annotations("cells", [annotation(1), annotation(2)])
        for _ in range(2):
            index.drop_annotations("cells", [1, 99])
        assert index.annotations("cells") == [annotation(2)]

    def test_an_annotation_of_an_unknown_image_stores_nothing(self, index):
        with pytest.raises(StateError, match="no image x"):
            index.put_annotations("cells", [annotation(1), annotation(2, "x")])
        assert index.annotations("cells") == []


class TestRounds:
    def test_an_unfinished_round_is_resumed(self, index):
        first = index.open_round("cells")
        assert (first.number, first.status) == (0, "running")
        assert index.open_round("cells") == first
        done = index.update_round("cells", 0, status="done", decision="first", metrics={"ap": 0.5, "per": {"x": [1]}})
        assert done.finished_at >= done.started_at
        assert index.update_round("cells", 0, status="done") == done
        assert index.open_round("cells").number == 1
        assert [row.number for row in index.rounds("cells")] == [0, 1]
        assert index.rounds("cells")[0] == done

    def test_finished_at_can_be_given(self, index):
        index.open_round("cells")
        assert index.update_round("cells", 0, status="done", finished_at=NOON).finished_at == NOON

    @pytest.mark.parametrize(
        ("fields", "error", "text"),
        [
            ({"project_id": 3}, InputError, "RoundRow cannot change project_id"),
            ({"decision": "maybe"}, InputError, "decision='maybe'"),
            ({"metrics": {"ap": float("nan")}}, NonFiniteError, "round 0 of 'cells'"),
        ],
    )
    def test_wrong_fields_are_named(self, index, fields, error, text):
        row = index.open_round("cells")
        with pytest.raises(error, match=text):
            index.update_round("cells", 0, **fields)
        assert index.rounds("cells") == [row]

    def test_a_round_that_was_not_opened(self, index):
        with pytest.raises(StateError, match="no round 4"):
            index.update_round("cells", 4, reason="")


IDS = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(1, 4)
OPERATIONS = st.one_of(
    st.tuples(st.just("add_images"), st.lists(st.builds(image, IDS, rank=st.none() | NUMBERS), max_size=3)),
    st.tuples(
        st.just("set_images"),
        st.dictionaries(
            IDS,
            st.fixed_dictionaries(
                {}, optional={"state": st.sampled_from(["open", "gone", "labelled"]), "rank": NUMBERS}
            ),
            max_size=3,
        ),
    ),
    st.tuples(
        st.just("put_annotations"),
        st.lists(
            st.builds(annotation, NUMBERS, IDS, st.integers(0, 3).map(lambda s: NOON + timedelta(seconds=s))),
            max_size=3,
        ),
    ),
    st.tuples(st.just("drop_annotations"), st.lists(NUMBERS, max_size=3)),
    st.tuples(st.just("set_used"), st.lists(NUMBERS, max_size=3), st.integers(0, 2)),
    st.tuples(st.just("open_round")),
    st.tuples(st.just("update_round"), st.integers(0, 2), st.sampled_from(["running", "done"])),
)


def apply(index: Index, operation: tuple) -> None:
    name, *arguments = operation
    with suppress(StateError):  # an image or round that is not there yet; refused the second time as well
        if name == "update_round":
            index.update_round("cells", arguments[0], status=arguments[1])
        else:
            getattr(index, name)("cells", *arguments)


def content(index: Index) -> tuple:
    rounds = [dataclasses.replace(row, started_at=NOON, finished_at=None) for row in index.rounds("cells")]
    return index.images("cells"), index.annotations("cells"), rounds


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(OPERATIONS, st.integers(2, 3)), max_size=8))
def test_any_call_can_be_repeated(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("index")
    once, often = (Index(f"sqlite:///{folder / name}") for name in ("once.sqlite", "often.sqlite"))
    for index, repeat in ((once, False), (often, True)):
        index.add_project("cells", ls_project_id=1, root="/", label_config="")
        for operation, times in plan:
            for _ in range(times if repeat else 1):
                apply(index, operation)
    assert content(once) == content(often)
    once.close()
    often.close()


WRITER = """
import sys
from datetime import UTC, datetime
from loop.adapters.index import AnnotationRow, AuditRow, ImageRow, Index
index, start, n = Index(sys.argv[1], wait_s=30), int(sys.argv[2]), int(sys.argv[3])
project = index.add_project("cells", ls_project_id=1, root="/", label_config="")
for i in range(start, start + n):
    index.add_images("cells", [ImageRow(project.id, str(i), "", "", "")])
    index.set_images("cells", {str(i): {"rank": i}})
    index.put_annotations("cells", [AnnotationRow(project.id, i, str(i), i, datetime.now(UTC), "")])
    index.open_round("cells")
"""


class TestAudits:
    def test_an_audit_is_kept_by_round_and_labeller_and_replaced_when_made_again(self, index):
        first = AuditRow(1, 2, "sam", "sam:vit_b", cells=40, hits=10, truths=50, image_ids=["a", "b"])
        again = dataclasses.replace(first, hits=20)
        other = AuditRow(1, 1, "champion", "celloop-cells-v1", cells=0, hits=0, truths=0)
        index.put_audits("cells", [first])
        index.put_audits("cells", [again, other])
        assert index.audits("cells") == [other, again]
        assert (again.precision, again.recall) == (0.5, 0.4)
        assert (other.precision, other.recall) == (None, None)

    def test_the_document_of_pseudo_labels_is_kept_with_the_round_and_never_nan(self, index):
        index.open_round("cells")
        index.update_round("cells", 0, pseudo={"on": True, "audits": {"sam": {"precision": 0.5}}})
        assert index.rounds("cells")[0].pseudo["audits"] == {"sam": {"precision": 0.5}}
        with pytest.raises(NonFiniteError, match="pseudo hold NaN"):
            index.update_round("cells", 0, pseudo={"ece": float("nan")})


class TestSeveralAtOnce:
    def test_two_processes_make_the_index_and_write_at_once(self, url):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, url, str(start), "25"], stderr=subprocess.PIPE)
            for start in (1, 26)
        ]
        for writer in writers:
            _, said = writer.communicate(timeout=120)
            assert writer.returncode == 0, said.decode()
        index = Index(url)
        assert sorted(row.rank for row in index.images("cells")) == list(range(1, 51))
        assert len(index.annotations("cells")) == 50
        assert [row.number for row in index.rounds("cells")] == [0]
        index.close()

    def test_threads_that_share_an_index_neither_lose_nor_fail(self, url):
        index = Index(url)
        started = threading.Barrier(6)

        def write(start: int) -> int:
            started.wait()
            index.add_project("cells", ls_project_id=1, root="/", label_config="")
            for i in range(start, start + 10):
                index.add_images("cells", [image(str(i))])
                index.set_images("cells", {str(i): {"rank": i}})
                index.images("cells")
            return index.open_round("cells").number

        with ThreadPoolExecutor(6) as pool:
            assert set(pool.map(write, range(0, 60, 10))) == {0}
        assert sorted(row.rank for row in index.images("cells")) == list(range(60))
        index.close()

    def test_a_reader_does_not_wait_for_a_writer(self, index, url):
        with index._write() as session:
            session.execute(sa.text("UPDATE projects SET name = 'wells'"))
            reader = Index(url, wait_s=0.1)
            assert [row.name for row in reader.projects()] == ["cells"]
            reader.close()

    def test_a_lock_that_is_held_too_long_is_named(self, index, url):
        late = Index(url, wait_s=0.1)
        with index._write() as session:
            session.execute(sa.text("SELECT 1"))
            with pytest.raises(ServiceError, match=r"locked; another process .* over 0.1 s"):
                late.set_synced("cells", NOON)
        late.close()


class TestOpening:
    @pytest.mark.parametrize(
        ("url", "text"),
        [
            ("not a url", "cannot be read; give sqlite"),
            ("mysql://u:secret@h/db", "asks for 'mysql'"),
            ("sqlite://", "names no file"),
            ("sqlite:///:memory:", "names no file"),
            ("sqlite:////no/such/folder/index.sqlite", "no such folder; make it"),
        ],
    )
    def test_a_url_that_cannot_work(self, url, text):
        with pytest.raises(ConfigError, match=text) as caught:
            Index(url)
        assert "secret" not in str(caught.value)

    def test_postgresql_without_its_driver_names_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(ConfigError, match=r"celloop\[postgres\]") as caught:
            Index("postgresql://user:secret@localhost/celloop")
        assert "secret" not in str(caught.value)

    def test_nothing_is_opened_before_the_first_call(self, tmp_path):
        Index(f"sqlite:///{tmp_path / 'index.sqlite'}")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_in_place_of_the_file(self, tmp_path):
        with pytest.raises(ConfigError, match="unable to open database file; check that its folder"):
            Index(f"sqlite:///{tmp_path}").projects()

    def test_a_file_that_is_no_index(self, tmp_path):
        (tmp_path / "index.sqlite").write_bytes(b"x" * 4096)
        with pytest.raises(ConfigError, match="not a database; the file is damaged"):
            Index(f"sqlite:///{tmp_path / 'index.sqlite'}").projects()

    def test_an_index_of_another_schema(self, index, url):
        with index._write() as session:
            session.execute(sa.text("UPDATE celloop_schema SET number = 99"))
        with pytest.raises(StateError, match="has schema 99, this celloop reads 4"):
            Index(url).projects()

    def test_an_index_of_the_first_schema_is_brought_up_to_date_and_keeps_its_rows(self, index, url):
        index.add_images("cells", [image("a", taught=True)])
        index.open_round("cells")
        with index._write() as session:
            for column in ("pseudo_taught", "note", "seconds", "annotators", "parent", '"top"', '"left"'):
                session.execute(sa.text(f"ALTER TABLE images DROP COLUMN {column}"))
            session.execute(sa.text("ALTER TABLE projects DROP COLUMN typical"))
            session.execute(sa.text("ALTER TABLE annotations DROP COLUMN reviewed"))
            session.execute(sa.text("DROP TABLE efforts"))
            session.execute(sa.text("ALTER TABLE rounds DROP COLUMN pseudo"))
            session.execute(sa.text("DROP TABLE pseudo_audits"))
            session.execute(sa.text("UPDATE celloop_schema SET number = 1"))
        index.close()
        later = Index(url)
        assert later.images("cells") == [image("a", taught=True, pseudo_taught=False)]
        later.set_images("cells", {"a": {"note": "about 3 min", "seconds": 170.0, "annotators": "[ann]"}})
        assert later.rounds("cells")[0].pseudo == {}
        assert later.audits("cells") == []
        assert later.efforts("cells") == []
        assert later.project("cells").typical == {}
        later.close()
        assert Index(url).images("cells")[0].image_id == "a"

    def test_a_failure_of_the_disk_leaves_the_index_as_it_was(self, index, url):
        index.add_images("cells", [image("a")])
        small = Index(url)

        def limit(connection, _record):
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages}")

        sa.event.listen(small._database._engine, "connect", limit)
        with pytest.raises(ServiceError, match=r"disk is full; free some space"):
            small.add_images("cells", [image(str(i), reason="x" * 1000) for i in range(100)])
        small.close()
        assert index.images("cells") == [image("a")]

    def test_passwords_stay_out_of_texts(self, monkeypatch):
        monkeypatch.setattr(
            "loop.adapters.index_database._build_engine", lambda url, wait_s: sa.create_engine("sqlite://")
        )
        assert repr(Index("postgresql://u:secret@h/d")) == "Index('postgresql+psycopg://u:***@h/d')"

    @pytest.mark.parametrize(
        ("said", "kind"),
        [
            ("connection failed: Connection refused", UnreachableError),
            ("failed to resolve host 'h'", UnreachableError),
            ('password authentication failed for user "x"', ConfigError),
            ("canceling statement due to lock timeout", ServiceError),
            ("something else", ServiceError),
        ],
    )
    def test_what_postgresql_says_becomes_an_error_with_a_cure(self, index, said, kind):
        error = sa.exc.OperationalError("SELECT 1", {}, OSError(errno.EIO, said), False)
        explained = index._database._explain(error)
        assert type(explained) is kind
        assert said in str(explained)
        assert issubclass(kind, LoopError)


@pytest.mark.parametrize("dialect", [postgresql.dialect(), sqlite.dialect()])
def test_the_tables_exist_in_both_dialects(dialect):
    made = [str(CreateTable(table).compile(dialect=dialect)) for table in Base.metadata.sorted_tables]
    assert len(made) == 7
    times = "TIMESTAMP WITH TIME ZONE" if dialect.name == "postgresql" else "DATETIME"
    assert any(times in text for text in made)
