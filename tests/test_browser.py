"""The panels in a real browser: JupyterLab 4 and Notebook 7 in headless Chromium.

TRALIGN_SCREENSHOTS: a folder for screenshots and latency.json (default: a temporary one). In JupyterLab the
sliders are moved by keyboard; Notebook 7 keeps the arrow keys for itself, so there the mouse clicks on them.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium")
lacking = [name for name in ("playwright", "jupyterlab", "ipywidgets") if not find_spec(name)]
lacking += [] if CHROMIUM else ["chromium (apt-get install chromium)"]
pytestmark = [pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}"),
              pytest.mark.timeout(420)]

WIDGET = "application/vnd.jupyter.widget-view+json"
ALPHA, TAU = "α: weight of the policy", "τ: steps between updates"
PAGES = {"lab": ("jupyterlab", "/lab/tree/"), "notebook": ("notebook", "/notebooks/")}
MOVES = 10  # of a slider, to measure a latency
SETUP = "import tralign_mini as tr"

# In the page: when was something done, and when was the picture that came after it on the screen?
WATCH = """image => {
    const act = () => { image.acted ??= performance.now(); };
    for (const event of ['keydown', 'pointerdown']) window.addEventListener(event, act, true);
    image.loads = 0;
    image.addEventListener('load', () => requestAnimationFrame(() => {
        image.loads += 1;
        if (image.acted) image.times.push(performance.now() - image.acted);
        image.acted = null;
    }));
}"""
BYTES = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(''));
}"""


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("TRALIGN_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """JupyterLab (and Notebook 7, if installed) with this Python as its kernel: (address, token, folder)."""
    home, token = tmp_path_factory.mktemp("jupyter"), secrets.token_hex(16)
    folder = home / "notebooks"
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    for path in (folder, quiet.parent):
        path.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(ROOT)}
    options = (f"--port={port}", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}",
               f"--IdentityProvider.token={token}", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0")
    log = open(home / "log", "w")
    command = [sys.executable, "-m", "jupyterlab", *options]
    process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        assert process.poll() is None, (home / "log").read_text()
        try:
            urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5)
            break
        except OSError:
            time.sleep(0.25)
    yield address, token, folder
    process.terminate()
    process.wait(20)
    log.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(server, browser, screenshots):
    """opened(kind, name, cells) -> a page on which all cells of a new notebook have been run."""
    address, token, folder = server
    pages = []

    def open_notebook(kind: str, name: str, cells: list[str]):
        package, path = PAGES[kind]
        if not find_spec(package):
            pytest.skip(f"not installed: {package}")
        write_notebook(folder / f"{name}.ipynb", cells)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        pages.append((name, page))
        page.set_default_timeout(90_000)
        page.goto(f"{address}{path}{name}.ipynb?token={token}" + ("&reset" if kind == "lab" else ""))
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        wait_for_kernel(f"{address}/api/sessions?token={token}", f"{name}.ipynb")
        page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
        page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).click()
        return page

    yield open_notebook
    for name, page in pages:
        page.screenshot(path=screenshots / f"end-{name}.png")
        page.close()


def wait_for_kernel(address: str, name: str) -> None:
    """Until the notebook's kernel is idle: to run cells earlier makes JupyterLab ask which kernel to take."""
    for _ in range(240):
        sessions = json.loads(urllib.request.urlopen(address, timeout=5).read())
        kernels = [session["kernel"] for session in sessions if session["path"] == name]
        if kernels and kernels[0]["execution_state"] == "idle" and kernels[0]["connections"]:
            time.sleep(1)  # the page hears of it, too
            return
        time.sleep(0.25)
    raise AssertionError(f"{name} has no kernel: {sessions}")


def write_notebook(path: Path, cells: list[str]) -> None:
    import nbformat.v4 as nb

    notebook = nb.new_notebook(cells=[nb.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(json.dumps(notebook))


def cell(page, number: int):
    """The output of a cell with a panel, once its picture is there."""
    output = page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea")
    output.locator("img.widget-image").wait_for()
    output.scroll_into_view_if_needed()
    return output


def slider(output, description: str):
    return output.locator(".widget-slider, .widget-select-slider").filter(has_text=description)


def move(output, description: str, times: int = 1, *, mouse: bool = False) -> list[float]:
    """Move a slider (by keyboard: to the left), wait for the picture, and so on; the latencies in ms."""
    image, control = output.locator("img.widget-image"), slider(output, description)
    image.evaluate("image => { image.times = []; image.acted = null; }")
    for i in range(times):
        if mouse:
            track = control.locator(".noUi-base").bounding_box()
            time.sleep(0.5)  # not a double click
            place = (0.15 + 0.35 * i) % 0.85  # never on the handle, which would only be grasped
            output.page.mouse.click(track["x"] + place * track["width"], track["y"] + 1)
        else:
            control.locator(".noUi-handle").focus()
            output.page.keyboard.press("ArrowLeft")
        output.page.wait_for_function("([image, count]) => image.times.length > count",
                                      arg=[image.element_handle(), i], polling=5)
    return image.evaluate("image => image.times")


def watched(output):
    output.locator("img.widget-image").evaluate(WATCH)
    return output


def shown(output) -> bytes:
    return base64.b64decode(output.locator("img.widget-image").evaluate(BYTES))


def until(there, seconds: float = 90):
    """What `there()` returns, once it is true."""
    for _ in range(int(seconds * 10)):
        if found := there():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def saved(page, path: Path) -> list[dict]:
    """The panels' outputs as the notebook is saved: what a reader on GitHub gets."""
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    until(lambda: path.stat().st_mtime_ns != before)
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell["outputs"]]
    return [output["data"] for output in outputs if WIDGET in output.get("data", {})]


def note(screenshots: Path, name: str, times: list[float]) -> None:
    """Keep a measurement beside the screenshots."""
    path = screenshots / "latency.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {"median_ms": round(statistics.median(times)), "max_ms": round(max(times)), "n": len(times)}
    path.write_text(json.dumps(known, indent=1))


@pytest.mark.parametrize("kind", PAGES)
def test_sliders_move_the_pictures(opened, server, screenshots, kind):
    panels = ["loss_explorer()", "reference_explorer()", "toy_explorer('bandit-helps')"]
    page = opened(kind, f"explorers-{kind}", [SETUP, *(f"tr.widgets.{panel}" for panel in panels)])
    cell(page, len(panels))  # while a cell runs, no slider is heard
    for number, panel in enumerate(panels, 1):
        name, output = panel.partition("(")[0], watched(cell(page, number))
        assert output.locator("img").count() == 1  # the picture for other readers is not shown a second time
        if name == "toy_explorer":  # it looks up what is trained: wait for the whole map
            output.locator(".progress-bar[style*='width: 100%']").wait_for(timeout=240_000)
        first = shown(output)
        times = move(output, ALPHA, MOVES + 1, mouse=kind == "notebook")[1:]  # the first draws everything
        assert shown(output) != first
        page.screenshot(path=screenshots / f"{kind}-{name}.png")
        if name != "loss_explorer":
            before = shown(output)
            times += move(output, TAU, 3, mouse=kind == "notebook")
            assert shown(output) != before
        note(screenshots, f"{kind} {name}", times)
        assert statistics.median(times) < 400  # 70 to 125 on two cores; other tests may run beside this one
    outputs = saved(page, server[2] / f"explorers-{kind}.ipynb")
    assert len(outputs) == len(panels)
    assert all(base64.b64decode(output["image/png"]).startswith(b"\x89PNG") for output in outputs)


def test_a_storm_of_keys_ends_with_the_newest_picture(opened):
    from tralign_mini.widgets import loss_explorer

    page = opened("lab", "storm", [SETUP, "tr.widgets.loss_explorer()"])
    output = watched(cell(page, 1))
    slider(output, ALPHA).locator(".noUi-handle").focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")  # nobody waits for a picture
    until(lambda: slider(output, ALPHA).locator(".widget-readout").inner_text() == "0.00")
    panel = loss_explorer()
    panel.alpha.value = 0.0
    assert panel.wait()
    until(lambda: shown(output) == panel.image.value)
    assert output.locator("img.widget-image").evaluate("image => image.loads") <= 20


@pytest.mark.parametrize("kind", PAGES)
def test_a_run_is_steered_while_it_trains(opened, server, screenshots, kind):
    settings = "max_steps=60, batch_size=8, eval_steps=5, eval_prompts=8, warmup_steps=0"
    panel = f"tr.widgets.live_run('little-tldr', {settings}, output='live-{kind}')"
    page = opened(kind, f"live-{kind}", [SETUP, panel])
    output, run = watched(cell(page, 1)), server[2] / f"live-{kind}"
    first = shown(output)

    def click(name: str) -> None:
        output.get_by_role("button", name=name).click()

    def state() -> tuple[str, int]:
        text = output.locator(".widget-html").first.inner_text()
        return re.search(r"(\w+), step (\d+)", text).groups()

    def reached(wanted: str, step: int = 0) -> int:
        until(lambda: state()[0] == wanted and int(state()[1]) >= step)
        return int(state()[1])

    click("Start")
    reached("running", 3)
    if kind == "lab":
        slider(output, ALPHA).locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        wanted = 0.65
    else:
        track = slider(output, ALPHA).locator(".noUi-base").bounding_box()
        page.mouse.click(track["x"] + 0.9 * track["width"], track["y"] + 1)
        wanted = 0.9
    changes = run / "changes.jsonl"
    assert until(lambda: changes.exists() and json.loads(changes.read_text()))["alpha"] == wanted
    reached("running", json.loads(changes.read_text())["step"] + 4)
    click("Pause")
    reached("paused")
    time.sleep(1.5)  # the step that was being done
    done = len((run / "metrics.jsonl").read_text().splitlines())
    time.sleep(1.5)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == done
    page.screenshot(path=screenshots / f"{kind}-live_run.png")
    click("Resume")
    reached("running", done + 2)
    click("Stop")
    assert reached("stopped") < 60
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["alpha"] == 0.6 and rows[-1]["alpha"] == wanted
    assert (run / "checkpoints" / f"checkpoint-{len(rows)}").is_dir()
    time.sleep(3)  # the last picture, and the one that stays in the notebook
    assert output.locator("img").count() == 1
    last = shown(cell(page, 1))
    assert last != first
    [data] = saved(page, server[2] / f"live-{kind}.ipynb")
    assert base64.b64decode(data["image/png"]) == last  # a reader on GitHub sees the end of the run


def test_runs_are_filtered_and_asked(opened, server, screenshots):
    import tralign_mini as tr

    small = {"max_steps": 4, "batch_size": 8, "eval_steps": 2, "eval_prompts": 6, "learning_rate": 1e-3}
    for reference in ("fixed", "soft"):
        output = str(server[2] / "runs" / reference)
        tr.train("little-tldr", reference=reference, tau=2, output=output, warmup_steps=0, **small)
    page = opened("lab", "runs", [SETUP, "tr.widgets.runs_explorer('runs')",
                                  "tr.widgets.playground(['runs/fixed', 'runs/soft'])"])
    cell(page, 2)
    runs = watched(cell(page, 1))
    first = shown(runs)
    runs.get_by_role("button", name="margin").click()
    second = until(lambda: shown(runs) != first and shown(runs))
    runs.locator("select").nth(1).select_option(label="0.6")  # alpha
    until(lambda: shown(runs) != second)
    page.screenshot(path=screenshots / "lab-runs_explorer.png")
    playground = watched(cell(page, 2))
    first = shown(playground)
    prompt = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: My aunt fed my cat.\n\nTL;DR:"
    playground.locator("textarea").fill(prompt)
    playground.get_by_role("button", name="Answer").click()
    until(lambda: shown(playground) != first)
    page.screenshot(path=screenshots / "lab-playground.png")
