"""Where each value of a program comes from."""

from collections.abc import Sequence

from fbackprop.explaining.program import Program
from fbackprop.explaining.record import Source

__all__ = ["layer_of", "sources_of"]


def sources_of(program: Program, labels: Sequence[str]) -> dict[int, Source]:
    """Where every value of a program comes from."""
    found = {v: Source((label,)) for v, label in zip(program.arguments, labels)}
    found.update({v: Source() for v in (*program.constants, *program.literals)})
    step = 0
    for node in program.nodes:
        if node.call is not None:
            found.update((v, Source((), ((step, name),))) for v, name in zip(node.outputs, node.call.outputs))
            step += 1
            continue
        parts = [found[v] for v in node.inputs]
        leaves = tuple(dict.fromkeys(label for part in parts for label in part.leaves))
        steps = tuple(sorted({place for part in parts for place in part.steps}))
        through = tuple(dict.fromkeys(name for part in parts for name in part.through))
        for i, v in enumerate(node.outputs):
            name = f"[{i}]" if node.name == "unstack" else node.name
            found[v] = Source(leaves, steps, (*through, name) if leaves or steps else ())
    return found


def layer_of(sources: Sequence[Source], parameters: set[str]) -> str:
    """The common path of the parameters that go into a call."""
    own = [s for s in sources if not s.steps and len(s.leaves) == 1 and s.leaves[0] in parameters]
    parents = [s.leaves[0].split("/")[:-1] for s in own]
    if not parents:
        return ""
    common = []
    for parts in zip(*parents):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    entries = {"".join(n for n in s.through if n.startswith("[")) for s in own}
    return "/".join(common) + (entries.pop() if len(entries) == 1 else "")
