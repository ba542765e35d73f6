"""The next lease: who takes part, who has the state, who needs it, how far to go. A pure function of the members."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic_lm.control.assignment import assignments
from elastic_lm.control.membership import Member
from elastic_lm.control.spec import ControlSpec
from elastic_lm.protocol import Generation, Lease


@dataclass(frozen=True)
class Standing:
    """Where the run's state is among the members that can take part.

    `head` is the newest step that a whole state is at, None when there is none; `behind` are whole members that must redo
    a step before everybody goes on; `lacking` are members without a state.
    """

    head: int | None
    behind: tuple[Member, ...]
    lacking: tuple[Member, ...]
    whole: tuple[Member, ...]


def standing(members: list[Member], *, exact: bool) -> Standing:
    """`members` are the candidates. With fast sums a redone step has other bits, so those behind are overwritten."""
    whole = [m for m in members if m.whole]
    if not whole:
        return Standing(None, (), tuple(members), ())
    head = max(m.next_step for m in whole)
    behind = [m for m in whole if m.next_step < head]
    lacking = [m for m in members if not m.whole]
    if not exact:
        lacking += behind
        whole = [m for m in whole if m not in behind]
        behind = []
    return Standing(head, tuple(behind), tuple(lacking), tuple(whole))


def catch_up_lease(now: Standing, generation: Generation, spec: ControlSpec) -> Lease:
    """Only those furthest behind, for the one step that they lack: same bits, nobody overwritten."""
    lowest = min(m.next_step for m in now.behind)
    team = [m for m in now.behind if m.next_step == lowest]
    return _lease(team, generation, lowest, lowest + 1, spec)


def common_lease(
    members: list[Member],
    now: Standing,
    generation: Generation,
    spec: ControlSpec,
    *,
    restore: int | None,
    settled: Lease | None = None,
    trains: bool = True,
) -> Lease:
    """Everybody, up to the next checkpoint or the end. Without any state in memory all restore the same one.

    `settled`: the lease before, if all its members came back in agreement; the same ones then go on in their group.
    One that does not train ends where it starts: before an evaluation.
    """
    start = (restore or 0) if now.head is None else now.head
    stop = stop_step(start, spec) if trains else start
    lease = _lease(members, generation, start, stop, spec, restore=restore)
    if now.head is None:
        return lease
    if not now.lacking:
        return replace(lease, restore=None, continues=_group_to_keep(lease, settled))
    source = min(now.whole, key=lambda m: m.number)  # the one that has lived longest
    ranks = {m.member_id: rank for rank, m in enumerate(_in_rank_order(members))}
    return Lease(
        generation=lease.generation,
        members=lease.members,
        rendezvous=None,
        start_step=lease.start_step,
        stop_step=lease.stop_step,
        assignments=lease.assignments,
        source=ranks[source.member_id],
        receivers=tuple(sorted(ranks[m.member_id] for m in now.lacking)),
    )


def evaluation_lease(now: Standing, generation: Generation, batches: tuple[int, ...]) -> Lease:
    """All with the newest state, for held-out batches at the step that they are at: those who are slow get fewer."""
    assert now.head is not None and not now.behind
    ordered = _in_rank_order(list(now.whole))
    places = assignments(len(batches), [m.micro_batch_s for m in ordered])
    return Lease(
        generation=generation,
        members=tuple(m.member_id for m in ordered),
        rendezvous=None,
        start_step=now.head,
        stop_step=now.head,
        assignments=tuple(tuple(batches[place] for place in mine) for mine in places),
        evaluates=True,
    )


def _group_to_keep(lease: Lease, settled: Lease | None) -> Generation | None:
    if settled is None or settled.members != lease.members or lease.world_size == 1:
        return None
    return settled.generation


def stop_step(start: int, spec: ControlSpec) -> int:
    """Where a lease from `start` ends at the latest: the run's end, the next checkpoint or evaluation, or `lease_steps` on."""
    stop = min(spec.total_steps, start + spec.lease_steps)
    for every in (spec.checkpoint_every, spec.evaluate_every):
        if every:
            stop = min(stop, (start // every + 1) * every)
    return stop


def _lease(
    members: list[Member], generation: Generation, start: int, stop: int, spec: ControlSpec, restore: int | None = None
) -> Lease:
    ordered = _in_rank_order(members)
    return Lease(
        generation=generation,
        members=tuple(m.member_id for m in ordered),
        rendezvous=None,
        start_step=start,
        stop_step=stop,
        assignments=assignments(spec.num_micro_batches, [m.micro_batch_s for m in ordered]),
        restore=restore,
    )


def _in_rank_order(members: list[Member]) -> list[Member]:
    return sorted(members, key=lambda m: m.number)
