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
from conftest import ROOT

from sparsity_trap.settings import UserError

SQUARE = "binned_outputs/square_002um/"
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
}
IMAGE = BYTES(400_000)


@pytest.fixture
def downloads(monkeypatch):
    """The script as a module, giving up at the first failure and content with little disk."""
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    import download

    monkeypatch.setattr(download, "_ROOM", 0)
    monkeypatch.setattr(download, "_CURL", ["curl", "--silent", "--fail", "--location"])
    return download


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
    """Serves ``files`` by URL path; ``cut`` maps a path to the byte at which it hangs up once."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.requests = {}, {}, []
        self.base = f"http://127.0.0.1:{self.server_port}/samples"

    def put(self, file, content, patient="P5"):
        name = f"Visium_HD_Human_Colon_Cancer_{patient}"
        self.files[f"/samples/{name}/{name}_{file}"] = content


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, content = self.server, self.server.files.get(self.path)
        wanted = self.headers.get("Range")
        server.requests.append((self.path.rsplit("/")[-1], wanted))
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : server.cut.pop(self.path, len(content))])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
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


@pytest.mark.parametrize("start", ["", "./"])
def test_only_what_is_needed_is_kept(downloads, server, tmp_path, start):
    members = {start + name: content for name, content in (OTHER | KEPT).items()}
    server.put("binned_outputs.tar.gz", archive(members))
    outs = downloads.download("P5", tmp_path, server.base)
    assert outs == tmp_path / "P5" / "outs"
    assert files_in(outs) == KEPT | {"tissue_image.btf": IMAGE}
    record = json.loads((tmp_path / "P5" / "download.json").read_text())
    assert record == {n: hashlib.sha256(c).hexdigest() for n, c in files_in(outs).items()}
    assert set(files_in(tmp_path / "P5")) == {"download.json", *(f"outs/{name}" for name in record)}


def test_a_second_call_downloads_nothing(downloads, server, tmp_path):
    downloads.download("P5", tmp_path, server.base)
    server.requests.clear()
    downloads.download("P5", tmp_path, server.base)
    assert server.requests == []


@pytest.mark.parametrize("file", ["tissue_image.btf", "binned_outputs.tar.gz"])
def test_what_broke_off_goes_on_where_it_stopped(downloads, server, tmp_path, file):
    (path,) = (path for path in server.files if path.endswith(file))
    server.cut[path] = 100_000
    with pytest.raises(UserError, match="could not be read .* download again"):
        downloads.download("P5", tmp_path, server.base)
    outs = downloads.download("P5", tmp_path, server.base)
    asked = [wanted for name, wanted in server.requests if name.endswith(file)]
    assert asked == [None, "bytes=100000-"]
    assert files_in(outs) == KEPT | {"tissue_image.btf": IMAGE}


def test_changed_file_is_found(downloads, server, tmp_path):
    outs = downloads.download("P5", tmp_path, server.base)
    path = outs / SQUARE / "spatial" / "tissue_positions.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="tissue_positions.parquet has changed .* delete it"):
        downloads.download("P5", tmp_path, server.base)
    path.unlink()
    downloads.download("P5", tmp_path, server.base)
    assert path.read_bytes() == KEPT[SQUARE + "spatial/tissue_positions.parquet"]


def test_file_that_differs_from_its_first_download(downloads, server, tmp_path):
    outs = downloads.download("P5", tmp_path, server.base)
    (outs / "tissue_image.btf").unlink()
    server.put("tissue_image.btf", IMAGE[::-1])
    with pytest.raises(UserError, match="differs from the first download"):
        downloads.download("P5", tmp_path, server.base)


def test_files_put_there_by_hand_are_used(downloads, server, tmp_path):
    outs = tmp_path / "P5" / "outs"
    outs.mkdir(parents=True)
    (outs / "tissue_image.btf").write_bytes(IMAGE)
    downloads.download("P5", tmp_path, server.base)
    assert not [name for name, _ in server.requests if name.endswith("btf")]


def test_missing_address(downloads, server, tmp_path):
    with pytest.raises(UserError, match="P1_tissue_image.btf cannot be had; .*not certain"):
        downloads.download("P1", tmp_path, server.base)
    server.files.clear()
    with pytest.raises(UserError, match="cannot be had: check the address"):
        downloads.download("P5", tmp_path, server.base)


def test_no_server(downloads, tmp_path):
    with pytest.raises(UserError, match="could not be read .* check the connection"):
        downloads.download("P5", tmp_path, "http://127.0.0.1:9")


def test_no_curl(downloads, server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_CURL", ["no-such-curl"])
    with pytest.raises(UserError, match="no-such-curl is not installed"):
        downloads.download("P5", tmp_path, server.base)


@pytest.mark.parametrize(
    "members",
    [
        OTHER,
        {SQUARE + "spatial/../../../../../evil": b"x"} | KEPT,
        {SQUARE + "spatial/link.json": None} | KEPT,
    ],
    ids=["incomplete", "escaping", "link"],
)
def test_unsound_archive_is_refused(downloads, server, tmp_path, members):
    server.put("binned_outputs.tar.gz", archive(members))
    with pytest.raises(UserError, match="is not a whole, sound archive"):
        downloads.download("P5", tmp_path, server.base)
    assert set(files_in(tmp_path)) == {"P5/outs/tissue_image.btf"}


@pytest.mark.parametrize("content", [b"no archive", archive(KEPT)[:200_000]])
def test_damaged_archive(downloads, server, tmp_path, content):
    server.put("binned_outputs.tar.gz", content)
    with pytest.raises(UserError, match="not a whole, sound archive"):
        downloads.download("P5", tmp_path, server.base)
    assert not list(tmp_path.rglob("*.h5"))


def test_no_space(downloads, server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_ROOM", 1e18)
    with pytest.raises(UserError, match="GB free: free some"):
        downloads.download("P5", tmp_path, server.base)
    assert server.requests == []


def test_command_line(downloads, server, tmp_path, capsys):
    downloads.main(["P5", "--to", str(tmp_path), "--base", server.base])
    assert capsys.readouterr().out == f"{tmp_path / 'P5' / 'outs'}\n"
    with pytest.raises(SystemExit, match="error: patient 'P9' is not a public section"):
        downloads.main(["P9", "--to", str(tmp_path), "--base", server.base])
