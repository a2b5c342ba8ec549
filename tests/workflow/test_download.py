"""Downloads, from a local server that stands in for 10x Genomics'."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from sparsity_trap import download as downloads
from sparsity_trap.download import DATA_SETS, download, main
from sparsity_trap.settings import UserError

SQUARE = "binned_outputs/square_002um/"
NAME = DATA_SETS["P5"].name
BYTES = np.random.default_rng(0).bytes
KEPT = {
    SQUARE + "filtered_feature_bc_matrix.h5": BYTES(300_000),
    SQUARE + "spatial/tissue_positions.parquet": BYTES(50_000),
    SQUARE + "spatial/scalefactors_json.json": b'{"bin_size_um": 2.0}',
    SQUARE + "spatial/tissue_hires_image.png": BYTES(1000),
}
OTHER = {
    SQUARE + "raw_feature_bc_matrix.h5": BYTES(1000),
    SQUARE + "filtered_feature_bc_matrix/matrix.mtx.gz": BYTES(1000),
    "binned_outputs/square_008um/filtered_feature_bc_matrix.h5": BYTES(1000),
    "binned_outputs/square_016um/spatial/tissue_positions.parquet": BYTES(1_000_000),
}
IMAGE = BYTES(400_000)
SLICES = BYTES(200_000)


def archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves ``files`` by URL path; ``cut`` maps a path to byte counts after which it hangs up."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.requests, self.ranges = {}, {}, [], True
        self.refusal = 404
        self.base = f"http://127.0.0.1:{self.server_port}/samples"

    def put(self, file, content, name=NAME):
        self.files[f"/samples/{name}/{name}_{file}"] = content


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        server = self.server
        content = server.files.get(self.path)
        wanted = self.headers.get("Range")
        server.requests.append((self.command, self.path.rsplit("/")[-1], wanted))
        if content is None:
            self.send_error(server.refusal)
            return
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", etag)
        self.end_headers()
        if body:
            cuts = server.cut.get(self.path, [])
            end = cuts.pop(0) if cuts else len(content)
            self.wfile.write(content[start:end])
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "_PAUSE", 0)
    monkeypatch.setattr(downloads, "_BLOCK", 1 << 14)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.put("tissue_image.btf", IMAGE)
    server.put("binned_outputs.tar.gz", archive(KEPT | OTHER))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def files_in(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def cut(server, file, *ends):
    server.cut[f"/samples/{NAME}/{NAME}_{file}"] = list(ends)


def gets(server, file):
    return [r for method, path, r in server.requests if method == "GET" and path.endswith(file)]


def test_only_what_is_needed_is_kept(server, tmp_path):
    outs = download("P5", tmp_path, server.base)
    assert outs == tmp_path / "P5" / "outs"
    assert files_in(outs) == KEPT | {"tissue_image.btf": IMAGE}
    record = json.loads((tmp_path / "P5" / "download.json").read_text())
    for name, content in files_in(outs).items():
        sha256 = hashlib.sha256(content).hexdigest()
        assert record[name] == {"bytes": len(content), "sha256": sha256}


def test_optional_file_is_kept_where_there_is_one(server, tmp_path, capsys):
    server.put("feature_slice.h5", SLICES)
    cut(server, "feature_slice.h5", 50_000)
    outs = download("P5", tmp_path, server.base)
    whole = KEPT | {"tissue_image.btf": IMAGE, "feature_slice.h5": SLICES}
    assert files_in(outs) == whole
    assert gets(server, "feature_slice.h5") == [None, "bytes=50000-"]
    record = json.loads((tmp_path / "P5" / "download.json").read_text())
    assert record["feature_slice.h5"]["sha256"] == hashlib.sha256(SLICES).hexdigest()
    assert "note" not in capsys.readouterr().err
    server.requests.clear()
    download("P5", tmp_path, server.base)
    assert server.requests == []
    (outs / "feature_slice.h5").write_bytes(SLICES[:-1])
    with pytest.raises(UserError, match="feature_slice.h5 has changed .* delete it"):
        download("P5", tmp_path, server.base)


@pytest.mark.parametrize("refusal", [403, 404, 410])
def test_missing_optional_file_is_a_note(server, tmp_path, capsys, refusal):
    server.refusal = refusal
    outs = download("P5", tmp_path, server.base)
    assert files_in(outs) == KEPT | {"tissue_image.btf": IMAGE}
    note = f"P5_feature_slice.h5 cannot be had (HTTP {refusal}"
    assert capsys.readouterr().err.count(note) == 1
    server.requests.clear()
    download("P5", tmp_path, server.base)
    assert server.requests == [] and note not in capsys.readouterr().err


def test_other_refusals_of_the_optional_file_are_no_note(server, tmp_path):
    server.refusal = 429  # too many requests: it may well be there
    with pytest.raises(UserError, match="feature_slice.h5 cannot be had .HTTP 429"):
        download("P5", tmp_path, server.base)
    server.put("feature_slice.h5", SLICES)
    assert (download("P5", tmp_path, server.base) / "feature_slice.h5").read_bytes() == SLICES


def test_names_may_begin_with_a_dot(server, tmp_path):
    server.put("binned_outputs.tar.gz", archive({f"./{n}": c for n, c in (OTHER | KEPT).items()}))
    assert files_in(download("P5", tmp_path, server.base)) == KEPT | {"tissue_image.btf": IMAGE}


def test_a_second_call_downloads_nothing(server, tmp_path):
    download("P5", tmp_path, server.base)
    server.requests.clear()
    download("P5", tmp_path, server.base)
    assert server.requests == []


def test_cut_connections_are_resumed_within_a_call(server, tmp_path):
    cut(server, "tissue_image.btf", 100_000, 250_000)
    cut(server, "binned_outputs.tar.gz", 150_000)
    outs = download("P5", tmp_path, server.base)
    assert files_in(outs) == KEPT | {"tissue_image.btf": IMAGE}
    assert gets(server, "tissue_image.btf") == [None, "bytes=100000-", "bytes=250000-"]
    assert gets(server, "binned_outputs.tar.gz") == [None, "bytes=150000-"]


def test_image_is_resumed_by_a_later_call(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_ATTEMPTS", 1)
    cut(server, "tissue_image.btf", 100_000)
    with pytest.raises(UserError, match="closed at byte 100000 .* download again"):
        download("P5", tmp_path, server.base)
    assert not (tmp_path / "P5" / "outs" / "tissue_image.btf").exists()
    outs = download("P5", tmp_path, server.base)
    assert gets(server, "tissue_image.btf") == [None, "bytes=100000-"]
    assert (outs / "tissue_image.btf").read_bytes() == IMAGE


def test_part_of_an_older_image_is_not_continued(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_ATTEMPTS", 1)
    cut(server, "tissue_image.btf", 100_000)
    with pytest.raises(UserError):
        download("P5", tmp_path, server.base)
    server.put("tissue_image.btf", IMAGE[::-1])
    outs = download("P5", tmp_path, server.base)
    assert (outs / "tissue_image.btf").read_bytes() == IMAGE[::-1]


def test_finished_members_are_not_unpacked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_ATTEMPTS", 1)
    cut(server, "binned_outputs.tar.gz", 340_000)  # in the second member
    with pytest.raises(UserError, match="closed at byte 340000"):
        download("P5", tmp_path, server.base)
    matrix = tmp_path / "P5" / "outs" / SQUARE / "filtered_feature_bc_matrix.h5"
    written = matrix.stat().st_mtime_ns
    outs = download("P5", tmp_path, server.base)
    assert files_in(outs) == KEPT | {"tissue_image.btf": IMAGE}
    assert matrix.stat().st_mtime_ns == written


def test_server_that_cannot_resume(server, tmp_path):
    server.ranges = False
    cut(server, "tissue_image.btf", 100_000)
    with pytest.raises(UserError, match="cannot resume"):
        download("P5", tmp_path, server.base)


def test_changed_file_is_found(server, tmp_path):
    outs = download("P5", tmp_path, server.base)
    path = outs / SQUARE / "spatial" / "tissue_positions.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="tissue_positions.parquet has changed .* delete it"):
        download("P5", tmp_path, server.base)
    path.unlink()
    download("P5", tmp_path, server.base)
    assert path.read_bytes() == KEPT[SQUARE + "spatial/tissue_positions.parquet"]


def test_file_that_differs_from_its_first_download(server, tmp_path):
    outs = download("P5", tmp_path, server.base)
    (outs / "tissue_image.btf").unlink()
    server.put("tissue_image.btf", IMAGE[::-1])
    with pytest.raises(UserError, match="differs from the first download"):
        download("P5", tmp_path, server.base)
    assert not list(outs.glob("tissue_image*"))


def test_files_put_there_by_hand_are_used(server, tmp_path):
    outs = tmp_path / "P5" / "outs"
    outs.mkdir(parents=True)
    (outs / "tissue_image.btf").write_bytes(IMAGE)
    download("P5", tmp_path, server.base)
    assert gets(server, "tissue_image.btf") == []


def test_truncated_file_put_there_by_hand(server, tmp_path):
    outs = tmp_path / "P5" / "outs"
    outs.mkdir(parents=True)
    (outs / "tissue_image.btf").write_bytes(IMAGE[:1000])
    with pytest.raises(UserError, match="has 1000 bytes, the published file 400000"):
        download("P5", tmp_path, server.base)


def test_missing_address(server, tmp_path):
    with pytest.raises(UserError, match="P1.*HTTP 404.*not certain.*--base"):
        download("P1", tmp_path, server.base)
    server.files.clear()
    with pytest.raises(UserError, match="HTTP 404") as caught:
        download("P5", tmp_path, server.base)
    assert "not certain" not in str(caught.value)


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_PAUSE", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match="could not be read .* check the connection"):
        download("P5", tmp_path, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "name, content",
    [
        (SQUARE + "spatial/../../../../../evil", b"x"),
        (SQUARE + "spatial/../filtered_feature_bc_matrix.h5", b"x"),
        (SQUARE + "spatial/link.json", None),
    ],
)
def test_unsafe_archive_is_refused(server, tmp_path, name, content):
    server.put("binned_outputs.tar.gz", archive({name: content} | KEPT))
    with pytest.raises(UserError, match="unsafe name"):
        download("P5", tmp_path, server.base)
    assert set(files_in(tmp_path)) == {"P5/download.json", "P5/outs/tissue_image.btf"}


def test_incomplete_archive(server, tmp_path):
    server.put("binned_outputs.tar.gz", archive(OTHER))
    with pytest.raises(UserError, match="has no .*filtered_feature_bc_matrix.h5"):
        download("P5", tmp_path, server.base)


@pytest.mark.parametrize("content", [b"no archive", archive(KEPT)[:200_000]])
def test_damaged_archive(server, tmp_path, content):
    server.put("binned_outputs.tar.gz", content)
    with pytest.raises(UserError, match="not a sound archive"):
        download("P5", tmp_path, server.base)
    assert not list(tmp_path.rglob("*.h5"))


def test_no_space(server, tmp_path, monkeypatch):
    usage = downloads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs 0.0 GB .* free some space"):
        download("P5", tmp_path, server.base)
    assert gets(server, "tissue_image.btf") == []


def test_command_line(server, tmp_path, capsys):
    main(["P5", "--to", str(tmp_path), "--base", server.base])
    assert capsys.readouterr().out == f"{tmp_path / 'P5' / 'outs'}\n"
    with pytest.raises(SystemExit, match="error: patient 'P9' is not a public section"):
        main(["P9", "--to", str(tmp_path), "--base", server.base])
