"""What happens around an optimizer step besides learning: a progress bar, and a stop that loses nothing."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import TrainerCallback


class StopCallback(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once `stop` (a `threading.Event`) is set."""

    def __init__(self, stop):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.is_set() and not control.should_training_stop:
            control.should_training_stop = control.should_save = True


class Progress(TrainerCallback):
    """A progress bar that shows what matters: loss, reward margin, and how often the reference has moved."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, disable=not state.is_world_process_zero
        )

    def show(self, row: dict) -> None:
        numbers = {name: row.get(key) for name, key in (("loss", "loss"), ("margin", "rewards/margin"))}
        numbers = {name: f"{value:.3f}" for name, value in numbers.items() if value is not None}
        self.bar.set_postfix(numbers | {"updates": row.get("reference_updates", 0)}, refresh=False)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
