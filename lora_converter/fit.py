"""What does not fit, in one sentence per kind of misfit: every place that compares names and shapes says it so."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Shape = Iterable[int]


@dataclass
class Misfit:
    """What a file or state dict lacks, has in another shape, has too much, or as codes, compared with a model."""

    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    def compare(self, name: str, there: Shape, here: Shape) -> None:
        """Notes a tensor whose shape is not the model's."""
        there, here = tuple(there), tuple(here)
        if there != here:
            self.misshapen.append(f"{name} is {there} there and {here} in the model")

    def compare_number(self, name: str, there: float, here: float) -> None:
        """Notes a setting that is not the model's."""
        if there != here:
            self.misshapen.append(f"{name} is {there} there and {here} in the model")

    def raise_if_any(self, what: str, *, words: Mapping[str, str], hint: str = "") -> None:
        """One error with every misfit by name.

        Args:
            what: What does not fit what: `The base in F does not fit the model.`
            words: What to say after the number of `missing`, `misshapen`, `unknown` and `codes` names, in this order.
            hint: What to do.

        Raises:
            ValueError: There are misfits.
        """
        names: dict[str, list[str]] = vars(self)
        found = [f"{len(names[kind])} {says}: {', '.join(names[kind])}." for kind, says in words.items() if names[kind]]
        if found:
            raise ValueError(" ".join([what, *found, *([hint] if hint else [])]))
