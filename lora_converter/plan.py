"""What a step of a job takes on a rank, in words: figures of a run on fake tensors, whether they fit, and what would.

Host-neutral: who runs the steps fills in `Estimate`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_converter.figures import percent, short
from lora_converter.live_bytes import COMMUNICATION

BASE, TRAINED, GRADIENTS, OPTIMIZER = "base", "trained", "gradients", "optimizer"
BUFFERS, ACTIVATIONS, LOSS, WORKING = "buffers", "activations", "loss", "working memory"

MARGIN = 0.1
"""Of the peak: what the allocator cannot use, the CUDA context, the collectives' own buffers."""

_MEANINGS = {
    BASE: "frozen weights",
    TRAINED: "weights that train",
    GRADIENTS: "of these, from the backward to the next step",
    OPTIMIZER: "its state",
    BUFFERS: "the model's tables",
    ACTIVATIONS: "at most at a time in the forward; {saved} kept for the backward",
    LOSS: "logits and what is made of them",
    COMMUNICATION: "weights that are gathered, what collectives fill",
    WORKING: "at most at a time in the backward and the optimizer's step, recomputed activations too",
}
"""Kind -> what it is, in the order of a plan."""


@dataclass(frozen=True)
class Estimate:
    """Of one rank. Kinds are those of `_MEANINGS`, sizes bytes.

    Attributes:
        trained: Elements of parameters that train, of the whole model or pipeline stage.
        frozen: Elements of the others.
        sizes: Kind -> bytes, of what is there from one step to the next, and of gradients.
        saved: What the forward keeps for the backward.
        most: Kind -> most bytes at a time.
        at_peak: Kind -> bytes when their sum was largest.
    """

    trained: int
    frozen: int
    sizes: Mapping[str, int]
    saved: int
    most: Mapping[str, int]
    at_peak: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.at_peak.values())

    def fits(self, memory: float) -> bool:
        """In so many GiB, with the margin."""
        return self.peak * (1 + MARGIN) <= memory * 2**30

    def table(self) -> list[str]:
        """A line for each kind that is there."""
        sizes = {**self.most, **self.sizes}
        saved = f"{gib(self.saved)} GiB"
        kinds = [kind for kind in _MEANINGS if sizes.get(kind)]
        return [f"  {k:<15}{gib(sizes[k]):>8}  {sizes[k]:>18,}  {_MEANINGS[k].format(saved=saved)}" for k in kinds]

    def formula(self) -> str:
        """The peak as a sum, of what is at least a hundredth of a GiB."""
        terms = [(kind, self.at_peak.get(kind, 0)) for kind in _MEANINGS]
        named = [f"{kind} {gib(size)}" for kind, size in terms if float(gib(size)) > 0]
        return f"peak {gib(self.peak)} GiB = {' + '.join(named)}"


@dataclass(frozen=True)
class Plan:
    """Of a job.

    Attributes:
        job: What it is, in a few words.
        estimate: Of the rank that takes most.
        memory: Of a GPU, GiB.
        by_checkpointing: Mode -> estimate, of the activation checkpointing that the job could have.
        variations: What would be changed -> the estimate, or why it cannot be done. Where the job does not fit.
        notes: What was not run, or is not counted.
    """

    job: str
    estimate: Estimate
    memory: float
    by_checkpointing: Mapping[str, Estimate]
    variations: Mapping[str, Estimate | str]
    notes: Sequence[str]

    def __str__(self) -> str:
        found = self.estimate
        lines = [
            self.job,
            f"Parameters: {short(found.trained)} trained ({found.trained:,}), {short(found.frozen)} frozen "
            f"({found.frozen:,})",
            "",
            "On the rank that takes most, GiB and bytes:",
            *found.table(),
            "",
            found.formula(),
            self._verdict(found),
            "",
            "By activation checkpointing:",
            *(f"  {mode:<22}{self._short(found)}" for mode, found in self.by_checkpointing.items()),
        ]
        if self.variations:
            lines += ["", "What would change it:"]
            lines += [f"  {name:<22}{self._variation(found)}" for name, found in self.variations.items()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])

    def _verdict(self, found: Estimate) -> str:
        needed = f"{gib(found.peak)} + {percent(MARGIN, 0)} = {gib(int(found.peak * (1 + MARGIN)))}"
        return f"{'Fits' if found.fits(self.memory) else 'Does not fit'} in {self.memory:g} GiB: {needed}."

    def _short(self, found: Estimate) -> str:
        fits = "fits" if found.fits(self.memory) else "does not fit"
        return f"activations kept {gib(found.saved):>7}, peak {gib(found.peak):>7}, {fits}"

    def _variation(self, found: Estimate | str) -> str:
        if isinstance(found, str):
            return f"not possible: {found}"
        return f"{self._short(found)}: {found.formula()}"


def gib(size: int) -> str:
    """Bytes as GiB, two digits."""
    return f"{size / 2**30:.2f}"
