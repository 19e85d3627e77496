"""What the panels share: pictures drawn in a thread, controls that look alike, errors that are seen.

A moved slider only asks for a new picture. A thread makes it from the values that hold when it begins: while
it draws, any number of moves become one more picture, the newest. Figures are drawn by Agg into an
`ipywidgets.Image`; neither pyplot nor `Output` may be used from a thread.
"""

from __future__ import annotations

import base64
import html
import threading
from contextlib import contextmanager
from io import BytesIO

import ipywidgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..plot_style import INK
from ..trust_region import TrustRegion

DPI, WIDTH = 92, 11.2  # of all figures, the width in inches: as wide as a notebook's cell on a projector
ROOM = {"width": "100%", "max_width": f"{DPI * WIDTH:.0f}px"}
CONTROL = {"style": {"description_width": "180px"}, "layout": {"width": "495px"}}  # two in a row
TAUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LINGER = 10  # seconds that an idle thread waits for more work: it has its fonts loaded
_drawing = threading.Lock()  # matplotlib's caches are shared by all threads


class Worker:
    """Calls `work` in a thread after `ask`; what is asked while it works is one more call, however often."""

    def __init__(self, work):
        self._work, self._changed = work, threading.Condition()
        self._asked = self._busy = self._alive = False

    def ask(self) -> None:
        with self._changed:
            self._asked = True
            self._changed.notify_all()
            if not self._alive:
                self._alive = True
                threading.Thread(target=self._loop, daemon=True).start()

    def wait(self, timeout: float | None = None) -> bool:
        """Until there is nothing left to do; False if that took longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._asked or self._busy), timeout)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self._asked, LINGER):
                    self._alive = False
                    return
                self._asked, self._busy = False, True
            self._work()


class Picture:
    """A figure that is drawn again and again: axes and texts once, and then only `moving`, a list of artists.

    All is drawn anew when limits, titles or tick labels of the axes have changed.
    """

    def __init__(self, figure: Figure, moving: list):
        figure.set_dpi(DPI)
        self.figure, self.moving, self._still = figure, moving, None
        self._canvas = FigureCanvasAgg(figure)

    def png(self) -> bytes:
        for artist in self.moving:
            artist.set_animated(True)  # left out by figure.draw
        with _drawing:
            still = [(ax.get_xlim(), ax.get_ylim(), ax.get_title("left"), ax.get_ylabel(),
                      *(tick.get_text() for tick in ax.get_yticklabels())) for ax in self.figure.axes]
            if still != self._still:
                self._canvas.draw()
                self.figure.set_layout_engine("none")  # once is enough: it takes as long as the drawing
                self._still, self._background = still, self._canvas.copy_from_bbox(self.figure.bbox)
            self._canvas.restore_region(self._background)
            for artist in self.moving:
                self.figure.draw_artist(artist)
            size, pixels = self._canvas.get_width_height(), self._canvas.buffer_rgba()
            pixels = Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1).convert("RGB")
        file = BytesIO()
        pixels.save(file, "png", compress_level=1)
        return file.getvalue()


class Panel(ipywidgets.VBox):
    """Rows of controls, a picture, and a line that says what went wrong.

    A subclass has `picture()`, which makes the bytes of a PNG from the newest values of the controls. It is
    called in a thread: at the start, and whenever one of `watched` has changed.
    """

    def __init__(self, rows: list[list], watched: list):
        self.image = ipywidgets.Image(format="png", layout=ROOM)
        self.message, self._errors = ipywidgets.HTML(), {}
        self._drawer = Worker(self._draw)
        look = {"flex_flow": "row wrap", "align_items": "center", **ROOM}
        rows = [ipywidgets.HBox(controls, layout=look) for controls in rows]
        super().__init__([*rows, self.image, self.message])
        for control in watched:
            control.observe(lambda change: self._drawer.ask(), "value")
        self._drawer.ask()

    def picture(self) -> bytes:
        raise NotImplementedError

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

    def _draw(self) -> None:
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
    return ipywidgets.FloatSlider(value, min=low, max=high, step=step, readout_format=form,
                                  description=description, **CONTROL)


def one_of(description: str, values, value):
    """A slider over some numbers, and `value`."""
    options = [(f"{option:g}", option) for option in sorted({*values, value})]
    return ipywidgets.SelectionSlider(options=options, value=value, description=description, **CONTROL)


def alpha_slider(value: float):
    """0 is a reference that never moves, 1 a hard update."""
    return number("α: weight of the policy", value, 0, 1, 0.05, ".2f")


def tau_slider(value: int, taus=TAUS):
    return one_of("τ: steps between updates", taus, value)


def beta_slider(value: float, betas=BETAS):
    return one_of("β: pull to the reference", betas, value)


def choice(options: dict, value):
    """One of a few, label -> value, all of them visible."""
    return ipywidgets.ToggleButtons(
        options=options, value=value, style={"button_width": "auto"}, layout={"margin": "2px 16px 2px 2px"})


def region(alpha: float, tau: int) -> TrustRegion:
    """What the two sliders say."""
    alpha = round(alpha, 6)  # three steps of 0.05 are not 0.15 to the bit
    return TrustRegion(alpha, tau) if alpha else TrustRegion.fixed()


def around(values) -> tuple[float, float]:
    """Round numbers that enclose all values: limits of axes that change seldom."""
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(min(values), max(values))
    return ticks[0], ticks[-1]


def heading(ax, title: str) -> None:
    """A title that leaves room for a line of numbers below it."""
    ax.set_title(title, loc="left", fontsize=13.5, fontweight="bold", color=INK, pad=30)
