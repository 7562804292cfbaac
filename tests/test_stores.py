"""Batch runs from and to object stores: local S3 and Google Cloud Storage servers, file:// URIs and fsspec."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow.fs import GcsFileSystem

from p2l_engine.batch import BatchConfig, run
from p2l_engine.tables.find import find
from p2l_engine.tables.storage import Location
from p2l_engine.tables.stores import OPTIONS
from p2l_engine.tables.whole import read_table
from tests.support.batch_files import contents, write


@pytest.fixture(scope="module")
def store():
    """A client of a local S3 server with a bucket, which environment variables name."""
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
    server.stop()


def uploaded(store, key, path):
    store.upload_file(str(path), "bucket", key)
    return f"s3://bucket/{key}"


def parts(place):
    return {name: (place / name).read() for name in place.names() if name.startswith("part-")}


@pytest.mark.store
@pytest.mark.xdist_group("s3")
@pytest.mark.parametrize("kind", [".parquet", ".csv", ".jsonl.gz", ".jsonl.zst"])
def test_s3_gives_the_output_of_local_files(kind, router, store, tmp_path):
    path = tmp_path / f"in{kind}"
    write(path)
    options = {"budget": 1.5, "budget_scope": "batch", "rows_per_part": 32}
    run(router, BatchConfig([str(path)], str(tmp_path / "out"), **options))
    uri, output, state = uploaded(store, f"one{kind}/in{kind}", path), f"s3://bucket/out{kind}", str(tmp_path / "state")
    with pytest.raises(ValueError, match=r"state: expected a local folder where the output is not local \(s3://bucket/out"):
        run(router, BatchConfig([uri], output, **options))
    run(router, BatchConfig([uri], output, state=state, **options))
    assert parts(Location.of(output)) == parts(Location.of(str(tmp_path / "out")))
    assert len(parts(Location.of(output))) == 5
    assert run(router, BatchConfig([uri], output, state=state, **options)).rows == 150  # complete: nothing to do
    again = run(router, BatchConfig([uri], output, state=state, **options | {"budget": 2.0}, keep_coefficients=False))
    assert (again.computed, again.changed, list((tmp_path / "state").iterdir())) == (0, ("budget: was 1.5, is 2.0",), [])
    run(router, BatchConfig([str(path)], str(tmp_path / "out"), **options | {"budget": 2.0}))
    assert parts(Location.of(output)) == parts(Location.of(str(tmp_path / "out")))
    assert Location.of(output).sizes()["_SUCCESS"] == 0
    assert Location.of(f"{output}.run").names() == ["manifest.json"]


@pytest.mark.store
@pytest.mark.xdist_group("s3")
def test_an_interrupted_run_to_s3_is_resumed(router, store, tmp_path):
    uri = uploaded(store, "cut/in.jsonl", write(tmp_path / "in.jsonl"))
    options = {"budget": 1.5, "rows_per_part": 16, "state": str(tmp_path / "state")}
    run(router, BatchConfig([uri], "s3://bucket/whole", **options))

    def stop(report):
        if report.rows >= 48:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(router, BatchConfig([uri], "s3://bucket/cut-out", **options), progress=stop)
    cut = Location.of("s3://bucket/cut-out")
    assert 0 < len(parts(cut)) < 10
    with pytest.raises(ValueError, match=r"s3://bucket/cut-out: holds a run .*: column: was 'prompt', is 'id'"):
        run(router, BatchConfig([uri], "s3://bucket/cut-out", column="id", **options))
    run(router, BatchConfig([uri], "s3://bucket/cut-out", **options))
    assert parts(cut) == parts(Location.of("s3://bucket/whole"))
    store.put_object(Bucket="bucket", Key="cut/in.jsonl", Body=b'{"prompt": "another"}')
    with pytest.raises(ValueError, match="inputs: s3://bucket/cut/in.jsonl changed"):
        run(router, BatchConfig([uri], "s3://bucket/cut-out", **options))
    run(router, BatchConfig([uri], "s3://bucket/cut-out", **options), restart=True)
    assert len(parts(cut)) == 1


@pytest.mark.store
@pytest.mark.xdist_group("s3")
def test_folders_and_globs_find_the_same_files_in_s3_and_on_disk(store, tmp_path):
    names = ["a.csv", "b.csv", "deep/c.csv", "deep/er/d.csv", "_hidden/e.csv", "readme.txt"]
    (tmp_path / "x").mkdir()
    for name in names:
        path = tmp_path / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("prompt\nhello\n")
        uploaded(store, f"x/{name}", path)
    for named in ("x", "x/*.csv", "x/**/*.csv", "x/*/c.csv", "x/a.csv", "x/[ab].csv", "x/?.csv", "x/_h*/e.csv"):
        local = [file.location.path.removeprefix(str(tmp_path)) for file in find([str(tmp_path / named)])]
        stored = [file.location.path.removeprefix("bucket") for file in find([f"s3://bucket/{named}"])]
        assert stored == local != [], named
    twice = find(["s3://bucket/x/a.csv", "s3://bucket/x/*.csv", "s3://bucket/x/a.csv?region=eu-west-1"])
    assert [file.location.path for file in twice] == [
        f"bucket/x/{name}.csv" for name in ("a", "b", "a")
    ]  # another region is another store
    for named in (
        "s3://bucket/none",
        "s3://no-such-bucket/x",
        "s3://bucket/y/*.csv",
        "s3://bucket/x/readme.txt",
        "s3://bucket/x/[yz].csv",
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            find([named])


KEYS = [
    "a b.csv",
    "é.csv",
    "what?.csv",
    "x[12].csv",
    "100%.csv",
    "a%20b.csv",
    "n#1.csv",
    "a+b.csv",
    "d=2024%3A01/c.csv",
    "&=;,@:!.csv",
]


@pytest.mark.store
@pytest.mark.xdist_group("s3")
def test_keys_are_what_is_written(store):
    for key in [*KEYS, "x1.csv", "whats.csv"]:
        store.put_object(Bucket="bucket", Key=f"odd é/{key}", Body=f"prompt\n{key}\n".encode())
    for key in KEYS:
        for place in ("odd é", "odd%20%C3%A9"):  # decoded, where nothing is named so
            if place == "odd é" or "%" not in key:
                [file] = find([f"s3://bucket/{place}/{key}"])
                assert file.location.path == f"bucket/odd é/{key}"
                assert read_table(f"s3://bucket/{place}/{key}", ["prompt"]).columns["prompt"] == (
                    [key.replace(",", "")] if "," not in key else [None]
                )
    for named, keys in (
        ("a%2Bb.csv", ["a+b.csv"]), ("what%3F.csv", ["what?.csv"]), ("x[1].csv", ["x1.csv"]), ("*%20*", ["a%20b.csv"]),
        ("what?.csv?region=us-east-1", ["what?.csv"]), ("?[12]*.csv", ["x1.csv"]),
        ("d=2024%3A01/*", ["d=2024%3A01/c.csv"]), ("d=2024%3A01", ["d=2024%3A01/c.csv"]),
    ):  # fmt: skip
        assert [file.location.path for file in find([f"s3://bucket/odd é/{named}"])] == [f"bucket/odd é/{key}" for key in keys]
    assert [file.partitions for file in find(["s3://bucket/odd é/*/c.csv"])] == [(("d", "2024:01"),)]


part = st.text(st.characters(codec="utf-8", exclude_characters="/\x00"), min_size=1, max_size=6) | st.text(
    "%?#[]*+&=;: é20", min_size=1
)


@pytest.mark.slow
@given(key=st.lists(part.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3).map("/".join))
@example(key="a?b=1")
@example(key="%20%zz")
@settings(deadline=None, max_examples=200)
def test_a_key_is_what_is_written(key):
    """Options follow where a question mark and a name with "=" could be some; there, a key's own is %3F."""
    store = "s3://bucket/"
    if OPTIONS.search(key):
        key = key.replace("?", "")
    assert Location.of(f"{store}{key}?region=us-east-1", literal=True).path == f"bucket/{key}"
    assert Location.of(f"{store}{quote(key)}?region=us-east-1").path == f"bucket/{key}"
    assert Location.of(f"{store}{key}?region=us-east-1").path in (f"bucket/{key}", f"bucket/{unquote(key)}")


def test_stores_without_package_or_network_are_refused_in_one_line(monkeypatch):
    import fsspec

    class Broken(fsspec.AbstractFileSystem):
        protocol = "broken"

        def info(self, path, **_):
            raise KeyError("no\nnetwork")

    fsspec.register_implementation("broken", Broken, clobber=True)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for uri, message in (
        ("broken://a/b.csv", "the store does not answer: KeyError: 'no.*network'; check its package"),
        ("nowhere://bucket/in.csv", "Protocol not known: nowhere; check its package, its credentials and the network"),
        ("abfs://c/x.csv", "write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/"),
        ("az://c/x.csv", "Install adlfs"),
        ("hf://datasets/a/b.csv?", "set HF_TOKEN, or log in"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            find([uri])
        assert str(refused.value).startswith(uri.removesuffix("?"))
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 600


def test_outputs_in_stores_that_do_not_answer_are_refused_in_one_line(router, tmp_path):
    import fsspec

    class Closed(fsspec.AbstractFileSystem):
        protocol = "closed"

        def __getattribute__(self, name):
            if name in ("info", "ls", "find", "makedirs", "open", "_open", "exists", "isdir", "mkdir", "rm"):
                raise LookupError("no\ntoken")
            return super().__getattribute__(name)

    fsspec.register_implementation("closed", Closed, clobber=True)
    given = write(tmp_path / "in.csv")
    for output in ("closed://a/out", "abfs://c@account.dfs.core.windows.net/out"):
        with pytest.raises((OSError, ValueError), match=f"{output.partition('//')[0]}.*the store does not answer: ") as refused:
            run(router, BatchConfig([given], output, state=str(tmp_path / "state")))
        assert "\n" not in str(refused.value)
    place = Location.of("closed://a/out")
    for use in (place.names, place.read, place.make_folder, place.remove, lambda: place.write(b"data")):
        with pytest.raises(
            OSError, match="closed://a/out: the store does not answer: LookupError: no token; check its package"
        ):
            use()


def test_what_a_store_raises_while_it_is_read_is_one_line(tmp_path):
    import fsspec

    class Breaking(fsspec.AbstractFileSystem):
        protocol = "breaking"

        def info(self, path, **_):
            return {"name": path, "type": "file", "size": 100}

        def open(self, path, mode="rb", **_):
            raise LookupError("the token\nhas expired")

    fsspec.register_implementation("breaking", Breaking, clobber=True)
    for name in ("a.csv", "a.jsonl", "a.parquet", "a.csv.gz"):
        with pytest.raises(ValueError, match=f"breaking://.*{name}: cannot be read.*: LookupError: the token has expired"):
            read_table(f"breaking://x/{name}", ["prompt"])


@pytest.mark.store
@pytest.mark.xdist_group("s3")
def test_a_bucket_is_no_output_and_inputs_are_known_by_their_etag(router, store, tmp_path):
    """A copied object is the same input; two runs with one state folder do not write at once."""
    options = {"state": tmp_path / "state", "source": False}
    uri = uploaded(store, "etag/in.jsonl", write(tmp_path / "in.jsonl"))
    with pytest.raises(
        ValueError, match="output: expected a folder within s3://bucket, got its root; name one, such as s3://b"
    ):
        run(router, BatchConfig([uri], "s3://bucket", **options))

    def again(report):
        with pytest.raises(RuntimeError, match=r"run-[0-9a-f]+: another run is writing here"):
            run(router, BatchConfig([uri], "s3://bucket/etag-out", **options))

    run(router, BatchConfig([uri], "s3://bucket/etag-out", **options), progress=again)
    store.copy_object(Bucket="bucket", Key="etag-copy/in.jsonl", CopySource="bucket/etag/in.jsonl")
    assert run(router, BatchConfig(["s3://bucket/etag-copy/in.jsonl"], "s3://bucket/etag-out", **options)).changed == ()
    store.put_object(Bucket="bucket", Key="etag/in.jsonl", Body=(tmp_path / "in.jsonl").read_bytes().replace(b"so", b"os"))
    with pytest.raises(ValueError, match="inputs: s3://bucket/etag/in.jsonl changed"):
        run(router, BatchConfig([uri], "s3://bucket/etag-out", **options))


@pytest.mark.store
@pytest.mark.xdist_group("s3")
def test_errors_of_s3_name_the_uri(router, store, tmp_path):
    uri = uploaded(store, "refused/in.parquet", write(tmp_path / "in.parquet"))
    with pytest.raises(OSError, match="no-such-bucket"):
        run(router, BatchConfig([uri], "s3://no-such-bucket/out", state=str(tmp_path / "state")))
    store.put_object(Bucket="bucket", Key="mine/thesis.txt", Body=b"precious")
    with pytest.raises(ValueError, match=r"s3://bucket/mine: expected an empty folder .*, found thesis.txt"):
        run(router, BatchConfig([uri], "s3://bucket/mine", state=str(tmp_path / "state")), restart=True)
    with pytest.raises(ValueError, match="nowhere://bucket/in.csv: "):
        find(["nowhere://bucket/in.csv"])
    (tmp_path / "short.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:-50])
    uri = uploaded(store, "refused/short.parquet", tmp_path / "short.parquet")
    with pytest.raises(ValueError, match="s3://bucket/refused/short.parquet: cannot be read"):
        run(router, BatchConfig([uri], "s3://bucket/short", state=str(tmp_path / "state")))


@contextmanager
def google():
    """The port of a local server with a bucket. It needs its own process: Arrow holds the GIL while it opens files."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["start", "--in-memory", "--host", "127.0.0.1", "--port", str(port), "--default-bucket", "bucket", "--quiet"]
    with subprocess.Popen([sys.executable, "-m", "gcp_storage_emulator", *arguments]) as server:
        try:
            while server.poll() is None:  # a busy machine takes its time
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            assert server.poll() is None
            yield port
        finally:
            server.terminate()


@pytest.mark.store
@pytest.mark.slow
def test_google_cloud_storage_gives_the_output_of_local_files(router, tmp_path):
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    path = tmp_path / "in.jsonl.gz"
    write(path)
    options = {"budget": 1.5, "budget_scope": "batch", "rows_per_part": 32}
    run(router, BatchConfig([str(path)], str(tmp_path / "out"), **options))
    state = str(tmp_path / "state")

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    with google() as port:
        query = f"?scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=300"
        Location.of(f"gs://anonymous@bucket/x/in.jsonl.gz{query}").write(path.read_bytes())
        inputs, output = [f"gs://anonymous@bucket/x/*.gz{query}"], f"gs://anonymous@bucket/out{query}"
        assert isinstance(Location.of(output).system, GcsFileSystem)
        with pytest.raises(InterruptedError):
            run(router, BatchConfig(inputs, output, state=state, **options), progress=stop)
        with pytest.raises(ValueError, match="^gs://bucket/out: holds a run .*: column: was 'prompt', is 'id'"):
            run(router, BatchConfig(inputs, output, state=state, column="id", **options))
        assert run(router, BatchConfig(inputs, output, state=state, **options)).resumed >= 30
        assert parts(Location.of(output)) == parts(Location.of(str(tmp_path / "out")))
        assert len(parts(Location.of(output))) == 5
        odd = f"gs://anonymous@bucket/odd é/a b#1[2]%.csv{query}"
        Location.of(odd).write(b"prompt\nhello\n")
        assert read_table(odd, ["prompt"]).columns["prompt"] == ["hello"]
        assert [file.shown for file in find([f"gs://anonymous@bucket/odd é/*{query}"])] == ["gs://bucket/odd é/a b#1[2]%.csv"]
        with pytest.raises(ValueError, match="^gs://bucket/none: no such file or folder"):
            find([f"gs://anonymous@bucket/none{query}"])


def test_messages_show_no_credentials():
    place = Location.of("s3://KEY:SECRET@bucket/out?region=us-east-1&endpoint_override=localhost:1")
    assert Location.of("memory://lake/user:a@b.csv").shown == "memory://lake/user:a@b.csv"  # a key
    assert (place.shown, (place / "part").shown, place.path) == ("s3://bucket/out", "s3://bucket/out/part", "bucket/out")
    for uri in (
        "s3://KEY:SECRET@bucket/in.csv?nonsense=1",
        "s3://KEY:SEC/RET:SECRET@bucket/in.csv",
        "nowhere://KEY:SECRET@bucket/in.csv",
    ):
        with pytest.raises(ValueError, match="bucket/in.csv: ") as refused:
            find([uri])
        assert "SECRET" not in str(refused.value)


@pytest.mark.slow
def test_file_uris_and_fsspec_give_the_output_of_local_files(router, tmp_path):
    given = write(tmp_path / "in.parquet")
    options = {"budget": 1.5, "rows_per_part": 32}
    run(router, BatchConfig([given], str(tmp_path / "out"), **options))
    run(router, BatchConfig([f"file://{given}"], f"file://{tmp_path}/again", **options))
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/in/in.parquet", (tmp_path / "in.parquet").read_bytes())
    run(router, BatchConfig(["memory://in/*.parquet"], "memory://out", state=str(tmp_path / "state"), **options))
    assert parts(Location.of("memory://out")) == parts(Location.of(str(tmp_path / "out")))
