"""What the panels share: pictures drawn in a thread, controls that look alike, errors that are seen.

A moved slider only asks for a new picture. A thread makes it from the values that hold when it begins: while
it draws, any number of moves become one more picture, the newest. Figures are drawn by Agg into an
`ipywidgets.Image`; neither pyplot nor `Output` may be used from a thread.
"""

from __future__ import annotations

import base64
import html
import threading
from concurrent import futures
from contextlib import contextmanager
from io import BytesIO

import ipywidgets
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..trust_region import TrustRegion

DPI, WIDTH = 92, 11.2  # of all figures, the width in inches: as wide as a notebook's cell on a projector
ROOM = {"width": "100%", "max_width": f"{DPI * WIDTH:.0f}px"}
CONTROL = {"style": {"description_width": "180px"}, "layout": {"width": "495px"}}  # two in a row
ALPHA, TAU = "α: weight of the policy", "τ: steps between updates"
TAUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
DRAWING = threading.Lock()  # matplotlib's caches are shared by all threads


class Worker:
    """Calls `work` in a thread after `ask`; what is asked while it works is one more call, however often."""

    def __init__(self, work):
        self._work, self._last, self._thread = work, None, futures.ThreadPoolExecutor(1)

    def ask(self) -> None:
        if self._last is None or self._last.running() or self._last.done():  # else a call is yet to begin
            self._last = self._thread.submit(self._work)

    def wait(self, timeout: float | None = None) -> bool:
        """Until there is nothing left to do; False if one call took longer than `timeout` seconds."""
        waited = None
        while waited is not self._last:
            waited = self._last
            if futures.wait([waited], timeout).not_done:
                return False
        return True


class Picture:
    """A figure that is drawn again and again: what is added later on top of what it has at first, which is
    drawn anew only when limits, titles or tick labels of the axes have changed."""

    def __init__(self, figure: Figure):
        figure.set_dpi(DPI)
        self.figure, self._canvas, self._look = figure, FigureCanvasAgg(figure), None
        self._first = set(self._artists())

    def _artists(self) -> list[Artist]:
        return [artist for parent in (self.figure, *self.figure.axes) for artist in parent.get_children()]

    def added(self) -> list[Artist]:
        """The lowest first."""
        new = [artist for artist in self._artists() if artist not in self._first]
        return sorted(new, key=Artist.get_zorder)

    def clear(self) -> None:
        for artist in self.added():
            artist.remove()

    def png(self) -> bytes:
        for artist in self.added():
            artist.set_animated(True)  # left out by figure.draw
        with DRAWING:
            look = [(ax.get_xlim(), ax.get_ylim(), ax.get_title("left"), ax.get_ylabel(),
                     *(tick.get_text() for tick in ax.get_yticklabels())) for ax in self.figure.axes]
            if look != self._look:
                self._canvas.draw()
                self.figure.set_layout_engine("none")  # once is enough: it takes as long as the drawing
                self._look, self._background = look, self._canvas.copy_from_bbox(self.figure.bbox)
            self._canvas.restore_region(self._background)
            for artist in self.added():
                self.figure.draw_artist(artist)
            pixels = Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB")
        file = BytesIO()
        pixels.save(file, "png", compress_level=1)
        return file.getvalue()


class Panel(ipywidgets.VBox):
    """Rows of controls, a picture, and a line that says what went wrong.

    `draw()` of a subclass adds to the axes of `figure` what follows from the newest values of the controls.
    It is called in a thread: at the start, and whenever one of `watched` has changed. Without a `figure` the
    subclass makes a whole `picture()` instead.
    """

    def __init__(self, rows: list[list], watched: list, figure: Figure | None = None):
        self._picture = Picture(figure) if figure else None
        self.image = ipywidgets.Image(format="png", layout=ROOM)
        self.message, self._errors = ipywidgets.HTML(), {}
        self._drawer = Worker(self._show)
        look = {"flex_flow": "row wrap", "align_items": "center", **ROOM}
        rows = [ipywidgets.HBox(controls, layout=look) for controls in rows]
        super().__init__([*rows, self.image, self.message])
        for control in watched:
            control.observe(lambda change: self._drawer.ask(), "value")
        self._drawer.ask()

    def picture(self) -> bytes:
        """A PNG of the newest values."""
        self._picture.clear()
        self.draw()
        return self._picture.png()

    def wait(self, timeout: float | None = 60) -> bool:
        """Until the picture shows the newest values; False if that took longer than `timeout` seconds."""
        return self._drawer.wait(timeout)

    @property
    def error(self) -> Exception | None:
        """What failed last and has not worked since."""
        return next(reversed(self._errors.values()), None)

    def _settle(self) -> None:
        """Before the panel is shown."""
        self.wait()

    def _show(self) -> None:
        with self.errors_shown("picture"):
            self.image.value = self.picture()

    @contextmanager
    def errors_shown(self, what: str):
        """What fails inside becomes a red line below the picture; it goes when `what` works again."""
        try:
            yield
        except Exception as error:
            self._errors[what] = error
        else:
            if self._errors.pop(what, None) is None:
                return
        texts = (html.escape(f"{type(error).__name__}: {error}") for error in self._errors.values())
        look = "color:#B00020;white-space:pre-wrap;margin:4px 0"
        self.message.value = "".join(f'<pre style="{look}">{text}</pre>' for text in texts)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live view, and a picture for readers where no kernel runs, as on GitHub."""
        self._settle()
        picture = base64.b64encode(self.image.value).decode()
        text = f"{type(self).__name__}: run the cell to use it"
        return super()._repr_mimebundle_(**kwargs) | {"text/plain": text, "image/png": picture}


def number(description: str, value: float, low: float, high: float, step: float, form: str = ".0f"):
    """A slider over numbers."""
    look = {"readout_format": form, "description": description, **CONTROL}
    return ipywidgets.FloatSlider(value, min=low, max=high, step=step, **look)


def one_of(description: str, values, value):
    """A slider over some numbers, and `value`."""
    options = [(f"{option:g}", option) for option in sorted({*values, value})]
    return ipywidgets.SelectionSlider(options=options, value=value, description=description, **CONTROL)


def alpha_slider(value: float):
    """0 is a reference that never moves, 1 a hard update."""
    return number(ALPHA, value, 0, 1, 0.05, ".2f")


def tau_slider(value: int, taus=TAUS):
    return one_of(TAU, taus, value)


def beta_slider(value: float, betas=BETAS):
    return one_of("β: pull to the reference", betas, value)


def choice(options: dict, value):
    """One of a few, label -> value, all of them visible."""
    look = {"style": {"button_width": "auto"}, "layout": {"margin": "2px 16px 2px 2px"}}
    return ipywidgets.ToggleButtons(options=options, value=value, **look)


def region(alpha: float, tau: int) -> TrustRegion:
    """What the two sliders say."""
    alpha = round(alpha, 6)  # three steps of 0.05 are not 0.15 to the bit
    return TrustRegion(alpha, tau) if alpha else TrustRegion.fixed()


def around(values) -> tuple[float, float]:
    """Round numbers that enclose all values: limits of axes that change seldom."""
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(min(values), max(values))
    return ticks[0], ticks[-1]
