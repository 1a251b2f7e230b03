"""No page of the site that `make docs` has built scrolls sideways, on a telephone or on a desk."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from html import unescape

import pytest

from .blocks import ROOT

SITE = ROOT / "site"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1280)

pytestmark = [
    pytest.mark.docs,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built: make docs"),
]

MEASURE = """<!doctype html><body><pre id="out"></pre><script>
(async () => {
  const found = [];
  for (const width of WIDTHS) for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
    frame.src = page;
    document.body.appendChild(frame);
    await new Promise(loaded => frame.onload = loaded);
    await new Promise(laidOut => setTimeout(laidOut, 200));
    found.push([page, width, frame.contentDocument.documentElement.scrollWidth]);
    frame.remove();
  }
  document.getElementById("out").textContent = JSON.stringify(found);
})();
</script></body>"""


@pytest.fixture
def measured():
    """(page, width of the window, width of what is in it) of all pages."""
    pages = sorted(f"/{path.relative_to(SITE)}" for path in SITE.rglob("index.html"))
    document = MEASURE.replace("WIDTHS", json.dumps(WIDTHS)).replace("PAGES", json.dumps(pages))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/measure":
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(document.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=300000", "--dump-dom"]
        url = f"http://127.0.0.1:{server.server_address[1]}/measure"
        command = [str(CHROMIUM), *flags, "--window-size=1400,1000", url]
        dom = subprocess.run(command, check=True, text=True, capture_output=True, timeout=300).stdout
    finally:
        server.shutdown()
        server.server_close()
    found = json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert len(found) == len(WIDTHS) * len(pages)
    return found


def test_no_page_scrolls_sideways(measured):
    assert not [(page, window, content) for page, window, content in measured if content > window]
