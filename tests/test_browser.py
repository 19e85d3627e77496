"""The course in a real browser: JupyterLab 4 and Notebook 7 in headless Chromium.

JupyterLab opens the course's notebooks with panels, at their small scale, runs all cells, and the panels in
them are used; Notebook 7 opens panels alone. TRALIGN_SCREENSHOTS: a folder for screenshots and
latency.json (default: a temporary one). In JupyterLab the sliders are moved by keyboard; Notebook 7 keeps the
arrow keys for itself, so there the mouse clicks on them.
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

import nbformat
import pytest

from notebooks.run_all import SCALE, code_cells

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
COURSE = {  # notebook: its panels, and their sliders that are moved
    "02_the_moving_reference": {"loss_explorer": (ALPHA,), "reference_explorer": (ALPHA, TAU)},
    "03_toy_overoptimization": {"toy_explorer": (ALPHA, TAU)},
    "08_mixed_preference_optimization": {"split_explorer": ("easy: share of the pairs",)},
    "09_who_wins": {"judge_explorer": ("for the first place", "for each word more", "noise")},
}
ALONE = {"loss_explorer": "()", "reference_explorer": "()", "toy_explorer": "('bandit-helps')"}

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
    folder.mkdir()
    for name, text in {  # no news; every cell in the page, also what is not in sight
            "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
            "notebook-extension/tracker": '{"windowingMode": "none"}'}.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(ROOT), SCALE: "small"}
    own |= {"HF_HUB_OFFLINE": "1", "TRALIGN_CACHE": str(home / "cache")}
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
    """opened(kind, name, cells) -> (page, cells), all being run; without cells a notebook of ours."""
    address, token, folder = server
    pages = []

    def open_notebook(kind: str, name: str, cells: list[str] | None = None):
        package, path = PAGES[kind]
        if not find_spec(package):
            pytest.skip(f"not installed: {package}")
        ours = ROOT / "notebooks" / f"{name}.ipynb"
        cells = cells or [cell.source for cell in code_cells(nbformat.read(ours, as_version=4))]
        write_notebook(folder / f"{name}.ipynb", cells)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        pages.append((name, page))
        page.set_default_timeout(90_000)
        page.goto(f"{address}{path}{name}.ipynb?token={token}" + ("&reset" if kind == "lab" else ""))
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        wait_for_kernel(f"{address}/api/sessions?token={token}", f"{name}.ipynb")
        page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
        page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).click()
        return page, cells

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


def all_have_run(page, cells: list[str]) -> None:
    """While a cell runs, no slider is heard. An error would leave the last cell without its number."""
    last = page.locator(".jp-CodeCell").nth(len(cells) - 1).locator(".jp-InputPrompt")
    until(lambda: last.inner_text() == f"[{len(cells)}]:", 240)


def shown_panel(page, cells: list[str], name: str):
    """The output of the cell with a panel, once its picture is there."""
    [number] = [i for i, cell in enumerate(cells) if f"widgets.{name}(" in cell]
    output = page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea")
    output.locator("img.widget-image").wait_for()
    output.scroll_into_view_if_needed()
    return watched(output)


def slider(output, description: str):
    return output.locator(".widget-slider, .widget-select-slider").filter(has_text=description)


def move(output, description: str, times: int = 1, *, mouse: bool = False) -> list[float]:
    """Move a slider (by keyboard: to the left), wait for the picture, and so on; the latencies in ms."""
    control = slider(output, description)

    def click(i: int) -> None:
        track = control.locator(".noUi-base").bounding_box()
        time.sleep(0.5)  # not a double click
        place = (0.15 + 0.35 * i) % 0.85  # never on the handle, which would only be grasped
        output.page.mouse.click(track["x"] + place * track["width"], track["y"] + 1)

    def press(i: int) -> None:
        control.locator(".noUi-handle").focus()
        output.page.keyboard.press("ArrowLeft")
    return timed(output, click if mouse else press, times)


def timed(output, act, times: int) -> list[float]:
    """act(0), act(1), ..., each time until the next picture is there; the latencies in ms."""
    image = output.locator("img.widget-image")
    image.evaluate("image => { image.times = []; image.acted = null; }")
    for i in range(times):
        act(i)
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


def saved(page, path: Path, there) -> list[bytes]:
    """The panels' pictures in the saved notebook, what a reader on GitHub gets, once `there(pictures)`."""
    def pictures():
        page.keyboard.press("Control+s")
        time.sleep(0.5)
        try:
            cells = json.loads(path.read_text())["cells"]
        except json.JSONDecodeError:  # it is being written
            return None
        data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
        found = [base64.b64decode(one["image/png"]) for one in data if WIDGET in one and "image/png" in one]
        return found if there(found) else None  # a progress bar leaves no picture
    return until(pictures, 20)


def note(screenshots: Path, name: str, times: list[float]) -> None:
    """Keep a measurement beside the screenshots."""
    path = screenshots / "latency.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = {"median_ms": round(statistics.median(times)), "max_ms": round(max(times)), "n": len(times)}
    path.write_text(json.dumps(known, indent=1))


@pytest.mark.parametrize("kind, notebook", [*(("lab", name) for name in COURSE), ("notebook", "explorers")])
def test_sliders_move_the_pictures(opened, server, screenshots, kind, notebook):
    sliders = {panel: moved for panels in COURSE.values() for panel, moved in panels.items()}
    panels = COURSE.get(notebook) or ALONE
    alone = [SETUP, *(f"tr.widgets.{panel}{arguments}" for panel, arguments in ALONE.items())]
    page, cells = opened(kind, notebook, None if notebook in COURSE else alone)
    all_have_run(page, cells)
    for name in panels:
        output = shown_panel(page, cells, name)
        assert output.locator("img").count() == 1  # the picture for other readers is not shown a second time
        if name == "toy_explorer":  # it looks up what is trained: wait for the whole map
            output.locator(".progress-bar[style*='width: 100%']").wait_for(timeout=240_000)
        first = shown(output)
        first_one, *others = sliders[name]
        times = move(output, first_one, MOVES + 1, mouse=kind == "notebook")[1:]  # the first draws everything
        assert shown(output) != first
        page.screenshot(path=screenshots / f"{kind}-{name}.png")
        for other in others:
            before = shown(output)
            times += move(output, other, 3, mouse=kind == "notebook")
            assert shown(output) != before
        note(screenshots, f"{kind} {name}", times)
        assert statistics.median(times) < 400  # 50 to 125 on two cores; other tests may run beside this one
    pictures = saved(page, server[2] / f"{notebook}.ipynb", lambda pictures: len(pictures) == len(panels))
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_a_storm_of_keys_ends_with_the_newest_picture(opened):
    from tralign_mini.widgets import loss_explorer

    page, cells = opened("lab", "storm", [SETUP, "tr.widgets.loss_explorer()"])
    output = shown_panel(page, cells, "loss_explorer")
    slider(output, ALPHA).locator(".noUi-handle").focus()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")  # nobody waits for a picture
    until(lambda: slider(output, ALPHA).locator(".widget-readout").inner_text() == "0.00")
    panel = loss_explorer()
    panel.alpha.value = 0.0
    assert panel.wait()
    until(lambda: shown(output) == panel.image.value)
    assert output.locator("img.widget-image").evaluate("image => image.loads") <= 20


def test_the_grid_of_notebook_04_and_a_run_that_is_steered(opened, server, screenshots):
    name = "04_a_little_tldr"
    page, cells = opened("lab", name)
    all_have_run(page, cells)
    grid = shown_panel(page, cells, "runs_explorer")
    first, epochs = shown(grid), grid.locator("select").last
    times = timed(grid, lambda i: epochs.locator("option").nth(i % 2).click(), 6)
    assert shown(grid) != first and epochs.locator("option:checked").all_inner_texts() == ["4"]
    page.screenshot(path=screenshots / "lab-runs_explorer.png")
    note(screenshots, "lab runs_explorer", times)
    assert statistics.median(times) < 700  # 60 runs are drawn: 116 on two idle cores, 423 on crowded ones
    steer("lab", page, shown_panel(page, cells, "live_run"), server[2] / "runs" / "live", screenshots)
    last = shown(shown_panel(page, cells, "live_run"))
    saved(page, server[2] / f"{name}.ipynb", lambda pictures: last in pictures)  # the end of the run


def test_a_run_is_steered_in_notebook_7(opened, server, screenshots):
    settings = "max_steps=60, batch_size=8, eval_steps=5, eval_prompts=8, warmup_steps=0"
    panel = f"tr.widgets.live_run('little-tldr', {settings}, output='live')"
    page, cells = opened("notebook", "live", [SETUP, panel])
    steer("notebook", page, shown_panel(page, cells, "live_run"), server[2] / "live", screenshots)


def steer(kind: str, page, output, run: Path, screenshots: Path) -> None:
    """Start, move alpha while it trains, pause, resume, stop; look at the picture and at the run's files."""
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
    assert shown(output) != first


def test_runs_are_filtered_and_asked(opened, server, screenshots):
    import tralign_mini as tr

    small = {"max_steps": 4, "batch_size": 8, "eval_steps": 2, "eval_prompts": 6, "learning_rate": 1e-3}
    for reference in ("fixed", "soft"):
        output = str(server[2] / "finished" / reference)
        tr.train("little-tldr", reference=reference, tau=2, output=output, warmup_steps=0, **small)
    page, cells = opened("lab", "runs", [SETUP, "tr.widgets.runs_explorer('finished')",
                                         "tr.widgets.playground(['finished/fixed', 'finished/soft'])"])
    playground = shown_panel(page, cells, "playground")
    runs = shown_panel(page, cells, "runs_explorer")
    first = shown(runs)
    runs.get_by_role("button", name="margin").click()
    second = until(lambda: shown(runs) != first and shown(runs))
    runs.locator("select").nth(1).select_option(label="0.6")  # alpha
    until(lambda: shown(runs) != second)
    first = shown(playground)
    prompt = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: My aunt fed my cat.\n\nTL;DR:"
    playground.locator("textarea").fill(prompt)
    playground.get_by_role("button", name="Answer").click()
    until(lambda: shown(playground) != first)
    page.screenshot(path=screenshots / "lab-playground.png")
