"""Serve the built book on this machine only: python workflow/serve.py 8000"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from sparsity_trap.settings import ROOT, UserError

BOOK = ROOT / "_build" / "html"


class Fresh(SimpleHTTPRequestHandler):
    """Lets the browser ask for a page again after the book was rebuilt."""

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def server(port: int) -> ThreadingHTTPServer:
    """Server of the built book on a port of this machine; port 0 takes one that is free."""
    if not (BOOK / "index.html").is_file():
        raise UserError("there is no book in _build/html yet: run make book")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Fresh, directory=BOOK))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} cannot be used ({error}): choose another, as in make serve PORT=8001"
        ) from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    try:
        with server(parser.parse_args().port) as running:
            address = f"http://127.0.0.1:{running.server_port}/"
            print(f"the book: {address} (Ctrl-C ends the server)", flush=True)
            running.serve_forever()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()
