"""Without checks an emergence on call makes its gates of the features of the last step."""

from typing import Any

from tests.engine import runs
from tests.spawn import spawn


def run() -> tuple[list[dict[str, Any]], list[int], list[str]]:
    """Events of an emergence between two steps, the sampled rows of each step, and answers to freezes in a step."""
    import mocte_ds
    from mocte_ds.errors import MocteError

    settings = runs.config(auto=False, ep_size=1, total_steps=10, spectrum={"rank": 4, "rows": 4096, "documents": 64})
    del settings["scheduler"]
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    events: list[dict[str, Any]] = []
    engine.mocte.on_event(events.append)
    rows = []
    for step in range(3):
        for turn in range(2):
            ids, _ = runs.batch(step, turn)
            engine.backward(engine(ids, labels=ids).loss)
            engine.step()
        rows.append(len(engine.mocte.run.samples.collectors[0].tokens()[0]))
    engine.mocte.emerge(1)
    said = []
    ids, _ = runs.batch(3, 0)
    loss = engine.scale(engine(ids, labels=ids).loss)
    for backward in (lambda: None, loss.backward):  # the loss's own backward, not the engine's
        backward()
        try:
            engine.mocte.freeze(1, 0)
            said.append("frozen")
        except MocteError as error:
            said.append(str(error))
    return events, rows, said


def test_emergence_on_call_sees_the_last_step() -> None:
    ((events, rows, said),) = spawn(run, 1, timeout=60, deepspeed=True)
    assert rows == [2 * runs.MICRO * runs.LENGTH] * 3, "the last step's tokens, all of them, and no older ones"
    emerged, frozen = (event for event in events if event["event"] in ("emergence", "freeze"))
    assert emerged["gate"] == "clusters of the sampled features" and emerged["output_change"] < 0.02
    assert (frozen["block"], frozen["expert"]) == (1, 0)
    assert said[0] == "frozen" and "between a backward pass and the optimizer's step" in said[1]
