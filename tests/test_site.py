"""The documentation site: every method is on it, it builds without a warning, a browser shows it well."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import diffkd
from diffkd.names import submodules
from diffkd.recipe.files import builtin
from diffkd.report.settings import groups

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
# The notebooks' runs are short, and shorter here.
SHORTER = {'"epochs": 12': '"epochs": 2', "EPOCHS = 20": "EPOCHS = 2", "batches(20)": "batches(2)"}
SHORTER |= {"epochs=4 teacher.train.epochs=6": "max_steps=3 trainer.epochs=1 teacher.train.epochs=1"}
_HERE = importlib.util.find_spec
needs_docs = pytest.mark.skipif(
    not all(map(_HERE, ("material", "mkdocstrings"))), reason="needs pip install '.[docs]'"
)
# Looks at every page in a frame as narrow as a telephone, and tells the server what it saw.
LOOK = """<body><script>
const inside = (e) => { for (; e && e.tagName !== "ARTICLE"; e = e.parentElement)
  if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true; return false; };
async function look(path) {
  const frame = document.body.appendChild(document.createElement("iframe"));
  Object.assign(frame.style, { width: "400px", height: "800px", border: "0" });
  const loaded = new Promise((done) => (frame.onload = done));
  frame.src = path;
  await loaded;
  await new Promise((done) => setTimeout(done, 50));
  const page = frame.contentDocument, all = [...page.querySelectorAll("article *")];
  const told = {
    path, title: page.title, width: page.documentElement.scrollWidth,
    wide: all.filter((e) => e.getBoundingClientRect().right > 401 && !inside(e))
      .map((e) => e.outerHTML.slice(0, 120)),
    broken: [...page.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src.slice(0, 90)),
    outside: frame.contentWindow.performance.getEntriesByType("resource").map((r) => r.name)
      .filter((name) => !name.startsWith(location.origin) && !name.startsWith("data:")),
  };
  frame.remove();
  return told;
}
(async () => {
  const told = [];
  for (const path of PAGES) told.push(await look(path));
  await fetch("/seen", { method: "POST", body: JSON.stringify(told) });
})();
</script></body>"""


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def staged(builder):
    """The pages with what is generated in place."""
    return builder.stage()


def test_every_method_has_formula_paper_and_when_to_use_it(staged):
    page = (staged / "methods.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## .*?\{ #(\w+) \}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(parts) == set(submodules("diffkd.methods"))
    for name, part in parts.items():
        assert part.count('!!! tip "When to use it"') == 1, f"{name}: its docstring has no 'Use it ...'"
        assert f"`method.{name}.weight`" in part, name
        if name != "none":
            assert re.search(r"^    \S.*=", part, re.MULTILINE), f"{name}: no formula"
            assert re.search(r"(CVPR|ECCV|ICCV|ICLR|NeurIPS|arXiv|TPAMI|AAAI|ICML|WACV)\b.*\d{4}", part), name


def test_settings_recipes_and_public_names_are_all_there(staged):
    settings = (staged / "settings.md").read_text(encoding="utf-8")
    assert [s.key for group in groups() for s in group.settings if f"| `{s.key}`<br>" not in settings] == []
    assert [n for n in submodules("diffkd.data") if f"### data={n}\n" not in settings] == []
    recipes = (staged / "paper.md").read_text(encoding="utf-8")
    shown = [name for name in builtin() if not name.rpartition("/")[2].startswith("_")]
    assert [name for name in shown if f"| `{name}` |" not in recipes] == []
    assert "DiffKD 72.22: published" in recipes
    api = (staged / "api.md").read_text(encoding="utf-8")
    assert [
        n for n in diffkd.__all__ if n[0] != "_" and not re.search(rf"^::: .*\.{n}$", api, re.MULTILINE)
    ] == []
    assert not [
        place for place in staged.glob("*.md") if "<!-- generated" in place.read_text(encoding="utf-8")
    ]


@pytest.fixture(scope="module")
def site(builder, staged, tmp_path_factory):
    place = tmp_path_factory.mktemp("site") / "site"
    builder.render(place)
    return place


def served(site: Path, seen: list, done: threading.Event) -> ThreadingHTTPServer:
    """A server of the site that takes what the looking page posts."""

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self):
            seen.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@needs_docs
def test_links_of_the_built_site_lead_somewhere(site):
    pages = sorted(site.rglob("index.html"))
    assert len(pages) > 15
    for page in pages:
        for target in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(site)}: {target}"


@needs_docs
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to show the site")
def test_a_browser_shows_every_page_on_a_narrow_screen(site, tmp_path):
    paths = [f"/{page.parent.relative_to(site).as_posix()}/" for page in sorted(site.rglob("index.html"))]
    (site / "look.html").write_text(LOOK.replace("PAGES", json.dumps(paths)), encoding="utf-8")
    seen, done = [], threading.Event()
    server = served(site, seen, done)
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command += ["--enable-logging=stderr", "--v=0", f"http://127.0.0.1:{server.server_port}/look.html"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log) as browser:
        done.wait(90)
        browser.terminate()
    server.shutdown()
    assert [page["path"] for page in seen] == paths
    for page in seen:
        assert page["width"] <= 400, page
        assert (page["wide"], page["broken"], page["outside"]) == ([], [], []), page
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "CONSOLE" in line]
    assert not [line for line in said if re.search("uncaught|error|refused|failed", line, re.IGNORECASE)]


@pytest.mark.skipif(not all(map(_HERE, ("nbclient", "ipykernel"))), reason="needs pip install '.[docs]'")
def test_notebooks_run(tmp_path, monkeypatch):
    import nbformat
    from jupyter_client.manager import start_new_kernel
    from nbclient import NotebookClient

    assert len(NOTEBOOKS) == 3
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DIFFKD_CACHE", str(tmp_path / "cache"))
    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(tmp_path)
    )  # one for all: imports are slow
    client.stop_channels()
    try:
        for place in NOTEBOOKS:
            found = nbformat.read(place, as_version=4)
            stored = [bool(cell.outputs) for cell in found.cells if cell.cell_type == "code"]
            for cell in found.cells:
                for long, short in SHORTER.items():
                    cell.source = cell.source.replace(long, short)
            NotebookClient(found, km=manager, timeout=120).execute()
            cells = [cell for cell in found.cells if cell.cell_type == "code"]
            assert all(cell.outputs for cell, had in zip(cells, stored, strict=True) if had), place.name
            assert any(stored), f"{place.name}: stored without what its cells gave"
    finally:
        manager.shutdown_kernel(now=True)
