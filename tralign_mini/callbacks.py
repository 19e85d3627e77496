"""What happens around an optimizer step: the reference moves, a bar shows it, a stop loses nothing."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import TrainerCallback

from .changes import write_change


class TrustRegionCallback(TrainerCallback):
    """Moves the reference after the optimizer step whenever the trust region says so (arXiv 2404.09656).

    control: asked before each step for the trust region that holds from now on, if anybody steers.
    """

    def __init__(self, trainer, control=None):
        self.trainer, self.control = trainer, control

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if self.control is not None and (region := self.control(step)) != self.trainer.trust_region:
            write_change(self.trainer.directory, step, region)
            self.trainer.trust_region = region

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.trust_region.is_due(state.global_step):
            trainer.update_numbers = trainer.reference.update(trainer.trust_region.alpha)
            trainer.reference_updates += 1


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
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, disable=hidden)

    def show(self, row: dict) -> None:
        shown = {name: f"{row[key]:.3f}" for name, key in (("loss", "loss"), ("margin", "rewards/margin"))
                 if row.get(key) is not None}
        self.bar.set_postfix(shown | {"updates": row.get("reference_updates", 0)}, refresh=False)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class TensorBoard:
    """The numbers of metrics.jsonl for TensorBoard."""

    def __init__(self, directory):
        self.directory, self.writer = directory, None

    def write(self, row: dict) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge: what an interrupted run wrote after its last checkpoint is written again
            self.writer = SummaryWriter(self.directory, purge_step=row["step"])
        for name, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()
