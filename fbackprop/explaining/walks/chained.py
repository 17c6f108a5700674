"""The chain of one weight as a table: a row for each factor from the loss back, a column for each path."""

from collections.abc import Sequence

from fbackprop.explaining.chains import Factor, Path
from fbackprop.explaining.record import Explanation
from fbackprop.explaining.walks.frame import Telling

__all__ = ["chain_of"]

_SHOWN = 4  # paths side by side
_KINDS = {  # the labels of seed 000: 액, 웨, …, 액, 앤
    "loss": ("loss", "손실"),
    "activation": ("activation (액)", "액 (활성화 함수)"),
    "weight": ("weight (웨)", "웨 (가중치)"),
    "input": ("node value (앤)", "앤 (노드 값)"),
    "bias": ("bias (1)", "편향 (1)"),
}


def chain_of(t: Telling, record: Explanation, place: str, names: Sequence[str]) -> tuple[Path, ...]:
    """Tells the chain of the element ``place``; ``names`` are what the walk calls the outputs of the steps.

    Returns:
      The paths, the largest first.
    """
    chain = record.chain(place)
    count, shown = len(chain.paths), chain.paths[:_SHOWN]
    if count == 1:
        t.text(
            f"One path leads from the loss to {place}. Its factors, from the loss back:",
            f"손실에서 {place}까지 가는 경로는 하나이다. 손실에서 거슬러 가며 만나는 인수는 다음과 같다.",
        )
    else:
        some = t.say(f", the {len(shown)} largest of them below" if count > len(shown) else "",
                     f" 아래는 그중 가장 큰 {len(shown)}개이다." if count > len(shown) else "")  # fmt: skip
        t.text(
            f"{count} paths lead from the loss to {place}{some}. Along a path the factors are multiplied; the gradient is the "
            "sum over all paths.",
            f"손실에서 {place}까지 가는 경로는 {count}개이다.{some} 한 경로에서는 인수를 곱하고, 기울기는 모든 경로의 합이다.",
        )
    titles, through = _titles(t, shown, names)
    rows: list[tuple[object, ...]] = [*through]
    for factors in zip(*(path.factors for path in shown)):
        kind = t.say(*_KINDS.get(factors[0].kind, (factors[0].op, factors[0].op)))
        rows.append((kind, _derivative(record, factors[0], names, place), *(f.value for f in factors)))
    rows.append((t.say("product", "곱"), "", *(path.product for path in shown)))
    t.table((t.say("factor", "인수"), "", *titles), rows)
    if count > len(shown):
        rest = sum(path.product for path in chain.paths[_SHOWN:])
        t.show(t.say(f"the other {count - len(shown)} paths", f"나머지 경로 {count - len(shown)}개의 합"), rest)
    if count > 1:
        t.show(t.say("sum over all paths", "모든 경로의 합"), chain.total)
    t.show(t.say(f"gradient of {place}", f"{place}의 기울기"), chain.gradient)
    if not chain.agrees:
        t.note(
            f"The sum differs from the gradient by {chain.difference:.3g}.", f"합이 기울기와 {chain.difference:.3g}만큼 다르다."
        )
    return chain.paths


def _titles(t: Telling, paths: Sequence[Path], names: Sequence[str]) -> tuple[list[str], list[tuple[object, ...]]]:
    """A title for each path, and rows that tell which elements it passes where one name does not tell them apart."""
    if len(paths) == 1:
        return [t.say("value", "값")], []
    passed = {}
    for factors in zip(*(path.factors for path in paths)):
        indices = [str(list(f.at)) for f in factors]
        if len(set(indices)) > 1 and factors[0].step is not None:
            passed[names[factors[0].step]] = indices
    apart = list(passed.values())
    if apart and all(indices == apart[0] for indices in apart):
        name = next(iter(passed))
        return [t.say(f"through {name}{i}", f"{name}{i} 경유") for i in apart[0]], []
    rows: list[tuple[object, ...]] = [(t.say("through", "지나는 곳"), name, *indices) for name, indices in passed.items()]
    return [t.say(f"path {i + 1}", f"경로 {i + 1}") for i in range(len(paths))], rows


def _derivative(record: Explanation, factor: Factor, names: Sequence[str], place: str) -> str:
    """Such as ∂d2/∂n1."""
    if factor.step is None:
        return factor.op
    source = record.steps[factor.step].source[factor.input]
    below = names[source.steps[0][0]] if source.steps else place
    return f"∂{names[factor.step]}/∂{below}"
