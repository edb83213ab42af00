"""Count the elements that ZeRO-3 has gathered at once, by the rules of DeepSpeed's coordinator.

A module's own parameters are gathered before it runs. After that, parameters of modules to come are fetched ahead, up
to a bucket and while few enough are whole. When a module has run, its parameters are released unless they are used
again soon. Several that are fetched in one go arrive in one buffer, from which each is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vessel.memory_plan.engine import Engine

Uses = Sequence[tuple[tuple[int, int], ...]]  # of each module that runs: its parameters, as (identity, elements)


def gathered_elements(order: Sequence[tuple[nn.Module, bool]], engine: Engine) -> int:
    """Count the most elements that are whole at once beside a rank's own shards.

    Args:
        order: as in `vessel.memory_plan.step.Step`; the backward pass goes through it from its end.
        engine: ZeRO-3 on some ranks.
    """
    if engine.ranks == 1 and not engine.offload_parameters:
        return 0  # a single rank's shard is the whole
    forward = [_own(module, engine.persistent) for module, _ in order]
    backward = [own for own, (_, passed) in zip(forward, order, strict=True) if passed][::-1]
    return _fullest([own for own in (*forward, *backward) if own], engine)


def _own(module: nn.Module, persistent: int) -> tuple[tuple[int, int], ...]:
    from peft.utils.other import TrainableTokensWrapper

    # the wrapper of token rows reads its table itself, without running the module that has it
    tensors = module.parameters(recurse=isinstance(module, TrainableTokensWrapper))
    return tuple((id(p), p.numel()) for p in tensors if p.numel() > persistent)


def _fullest(uses: Uses, engine: Engine) -> int:
    whole: dict[int, int] = {}
    most, ahead = 0, 0
    for now, own in enumerate(uses):
        fetched = [(key, n) for key, n in own if key not in whole]
        whole.update(fetched)
        most = max(most, sum(whole.values()) + _buffer(fetched))
        room = min(engine.live - sum(whole.values()), engine.prefetch)
        early: list[tuple[int, int]] = []
        ahead = max(ahead, now + 1)
        while ahead < len(uses) and sum(n for _, n in early) < room:
            early += [(key, n) for key, n in uses[ahead] if key not in whole and (key, n) not in early]
            ahead += 1
        whole.update(early)
        most = max(most, sum(whole.values()) + _buffer(early))
        kept = _soon(uses, now, ahead, engine.reuse)
        for key, _ in own:
            if key not in kept:
                whole.pop(key, None)
    return most


def _buffer(fetched: Sequence[tuple[int, int]]) -> int:
    return sum(n for _, n in fetched) if len(fetched) > 1 else 0


def _soon(uses: Uses, now: int, ahead: int, reuse: int) -> set[int]:
    """Find the parameters that are fetched ahead already, or used again before `reuse` elements have gone by."""
    found, passed = {key for own in uses[now + 1 : ahead] for key, _ in own}, 0
    for own in uses[now + 1 :]:
        if passed >= reuse:
            break
        found.update(key for key, _ in own)
        passed += sum(n for _, n in own)
    return found
