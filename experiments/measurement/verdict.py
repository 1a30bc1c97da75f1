"""Whether a TTFT figure can be trusted: the rules, and their application to a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from scipy import stats

from experiments.measurement.recomputed import wrong_figures
from experiments.measurement.statistics import BATCHES, NOISY_SPREAD, Interval, paired_ratio, spread
from experiments.results import ALONE, ArmTimes, DerivedPayload, Evidence, Row, Timed, TimedCall, TTFTPayload

MAX_DIRECT_RATIO = 1.2
"""How long the direct arm may take, as a multiple of build + merge + injected prefill. One direct pass does the work of
all three, so that an honest direct arm takes no longer than their sum; 20% is left for noise."""
MAX_OVER_BASELINE = 1.05
"""How long the direct arm may take, as a multiple of the independent forward pass in the same rounds."""
FLOOR_SHARE = 0.8
"""The share of the query's own prefill that an injected arm takes at least: 20% is left for noise."""
MAX_BUILD_OVER_DIRECT, BUILD_SLACK_S = 1.5, 0.1
"""A build computes fewer tokens than the direct arm; storing them is left some time."""
LEAST_WRITE_BYTES_PER_S = 0.25e9
"""How fast a build that ends with a file writes it at least, checksums included."""
MAX_LOST_SHARE, LOST_SLACK_S = 0.03, 1e-3
"""What an arm's clock may miss of the clock around it: returning and a garbage-free Python call."""
LEAST_BUILDS = 3
MAX_WARMUPS, MAX_RUNS = 1, 2
"""Calls of an arm before the timed ones, and runs of a cell's rounds."""
SHORT_LIMIT_S = 1e-3
"""Below this limit an engine's overheads outweigh a tiny model's work, so the limit says nothing about the rates."""
LEAST_LIMIT_SHARE, LONG_S = 0.1, 0.1
"""The share of an independent forward pass's time that the hardware's limit is at least, where it takes so long that
overheads don't count. Measured: 0.6 on a CPU. A limit far below says that the calibrated rates are too high."""
MOST_PADDING = 63
"""Tokens that an engine may add to a query, so that few graphs serve all lengths."""
RANDOM_WEIGHTS = "random"
"""What the rows of a model that was never trained call its weights."""
MAX_OVER_DATA_SHEET = 1.05
"""Calibrated rates over those of the data sheet."""
MAX_DRIFT, CHANCE_OF_DRIFT = 0.15, 0.02
"""How far the ratio of the arms may move from the first third of the rounds to the last, if it does so steadily: in an
order that independent rounds have with at most this chance."""
REPLAY_USES = "scenario.replay_uses"
ROUNDING = 1e-6
BASELINE = "baseline"
"""The arm that times the independent forward pass; `ALONE` is the query without a memory."""
RULES_VERSION = 2
"""Of the rules that gave a row its verdict. Version 1 had equal tokens, four rules and no stored calls."""


@dataclass(frozen=True)
class Verdict:
    """`reason` lists every rule that failed, or holds a remark on a valid row.

    invalid: a rule failed. undecided: no rule failed, but the samples are too few or too noisy to say so.
    """

    verdict: Literal["ok", "invalid", "undecided"]
    reason: str = ""


def judge(row: Row, figures: TTFTPayload) -> Verdict:
    """Applies the rules to one row, from what the row stores alone, so that anybody can apply them again.

    Each rule is a function of this file; its docstring says what it demands. A rule that fails makes the row invalid; a
    doubt makes it undecided.
    """
    evidence = figures.evidence
    if evidence is None:
        return Verdict("undecided", "the row has no evidence: it was measured before these rules")
    failed = [reason for rule in RULES for reason in rule(row, figures, evidence)]
    if failed:
        return Verdict("invalid", "; ".join(failed))
    doubts = [reason for doubt in DOUBTS for reason in doubt(row, figures, evidence)]
    if doubts:
        return Verdict("undecided", "; ".join(doubts))
    return Verdict("ok", "; ".join(remarks(row, evidence)))


def remarks(row: Row, evidence: Evidence) -> list[str]:
    """What a reader of a valid row should know."""
    found = []
    if (loss := evidence.loss) is not None:
        parts = [f"KV at most {loss.kv_off:.2g} off"]
        if loss.nll_above is not None and loss.agreement_pct is not None:
            parts += [f"{loss.nll_above:.2g} nats a token", f"{loss.agreement_pct:.3g}% of the next tokens the same"]
        found.append(f"{loss.method} is lossy, within what it states: {', '.join(parts)}")
    elif not evidence.exact and row.equality in ("drifted", "diverged"):
        found.append(f"the answers have {row.equality}, which is allowed because this merge is not exact")
    if evidence.same_query:
        found.append("every round had the same query: no other of the same length was found")
    if isinstance(row.payload, DerivedPayload):
        found += row.payload.remarks()
    return found


def same_prompt(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """In each round both arms received the same token ids."""
    for injected, direct in _rounds(evidence, row.arm, evidence.direct_arm):
        if injected.digest != direct.digest:
            yield f"the arms received different token ids ({direct.digest} direct, {injected.digest} {row.arm})"
            return


def hit_length(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """Every hit has the expected length; the direct arm has none.

    A shorter hit is not an injection, a longer one covers part of the query.
    """
    for call in _calls(evidence, row.arm):
        if call.cached_tokens != call.expected_tokens:
            yield f"{call.cached_tokens} tokens came from the cache, {call.expected_tokens} were expected"
            break
    if cached := max((call.cached_tokens for call in _calls(evidence, evidence.direct_arm)), default=0):
        yield f"{cached} tokens of the direct arm came from a cache: it was not cold"


def tokens_computed(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """As many tokens entered the model as each arm says, by a hook outside the engine where one can be set.

    A merge of several memories may compute tokens of them again, so its arm may compute more than its query.
    """
    for call in evidence.calls:
        owed, computed = call.prompt_tokens - call.cached_tokens, call.computed_tokens
        merges = row.memories > 1 and call.arm == row.arm
        if computed is not None and (computed < owed if merges else computed != owed):
            yield f"{computed} tokens entered the model in the {call.arm} arm, and its prompt needs {owed}"
            return


def products_computed(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """On an engine without a hook, as many tokens pass through every layer's matrix products as each arm says.

    They are counted by torch in one more call, whose logits are those of the timed one. An engine may pad
    a query, and a merge may compute more.
    """
    for call in evidence.calls:
        owed, seen = call.prompt_tokens - call.cached_tokens, call.products_tokens
        if seen is None:
            continue
        most = call.prompt_tokens if row.memories > 1 and call.arm == row.arm else owed + MOST_PADDING
        if not owed <= seen <= most:
            yield f"{seen} tokens passed through every layer in the {call.arm} arm, and its prompt needs {owed}"
        if (call.products_apart or 0.0) > (evidence.tolerance or 0.0):
            yield (
                f"the call of the {call.arm} arm whose tokens were counted has a logit {call.products_apart:.3g} off "
                "the timed one's"
            )


def limit(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """No arm is faster than the hardware's limit; such an arm did not do the work."""
    arms: tuple[tuple[str, ArmTimes], ...] = ((row.arm, figures.kv_arm), (evidence.direct_arm, figures.direct_arm))
    for arm, times in arms:
        if times.limit_s is not None and (reason := beats_limit(arm, times.ttft_s, times.limit_s)):
            yield reason


def floor(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """The injected arm is not faster than the same engine's prefill of the query alone, up to `FLOOR_SHARE`.

    Without an interval nothing is said: one disturbed call would decide.
    """
    alone_s = [call.engine_s for call in _calls(evidence, ALONE)]
    if alone_s:
        ratio, interval = paired_ratio([call.engine_s for call in _calls(evidence, row.arm)], alone_s)
        if interval is not None and interval[1] < FLOOR_SHARE:
            yield f"the {row.arm} arm took {ratio:.2f} times what the query alone takes: it did not compute all of it"


def baseline(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """The direct arm is at most 1.05 times as slow as the independent forward pass on the same prompt."""
    ratio, interval = _over_baseline(evidence)
    if interval is not None and interval[0] > (evidence.most_over_baseline or MAX_OVER_BASELINE):
        yield (
            f"the direct baseline is too slow: {ratio:.2f} times {evidence.reference}, timed in the same rounds "
            f"({interval[0]:.2f} to {interval[1]:.2f})"
        )


def peer(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """An arm that stands for what an engine does without us is at most 1.05 times its own entry point."""
    ratio, interval = _over(evidence, row.arm, evidence.peer_arm)
    if interval is not None and interval[0] > MAX_OVER_BASELINE:
        yield (
            f"the {row.arm} arm is too slow: {ratio:.2f} times {evidence.peer_arm}, timed in the same rounds "
            f"({interval[0]:.2f} to {interval[1]:.2f})"
        )


def build(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """Build, merge and injected prefill together take no less than the direct arm, which does the work of all three.

    It holds even between the fastest calls of the one side and the slowest of the other, with `MAX_DIRECT_RATIO` left
    for noise. Fewer than 6 rounds do not tell slow work from a disturbance, so they are left to `enough_pairs`. A build
    that takes too long is a doubt, `build_is_clear`: builds are not measured in the rounds, so that a busy moment can
    slow all of them.
    """
    direct_s = [call.engine_s for call in _calls(evidence, evidence.direct_arm)]
    if len(direct_s) < BATCHES:
        return
    kv_s = max(call.engine_s for call in _calls(evidence, row.arm))
    if reason := direct_too_slow(min(direct_s), max(evidence.build_all_s), kv_s, figures.merge_s or 0.0):
        yield reason


def clocks(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """Each arm's own clock accounts for the time around its calls, and its parts for the whole."""
    for arm in (row.arm, evidence.direct_arm):
        calls = _calls(evidence, arm)
        whole_s = median(call.outer_s for call in calls)
        if lost := clock_misses([call.outer_s for call in calls], [call.user_s for call in calls]):
            yield f"{lost} of a call of the {arm} arm are not in its TTFT"
        if any(call.engine_s + call.cache_s > call.user_s * (1 + ROUNDING) for call in calls):
            yield f"the parts of the {arm} arm's TTFT exceed the whole"
        split = [call for call in calls if call.split_s is not None]
        gaps_s = [call.user_s - call.engine_s - call.cache_s - (call.split_s or 0.0) for call in split]
        if len(gaps_s) >= BATCHES and median(gaps_s) > max(MAX_LOST_SHARE * whole_s, LOST_SLACK_S):
            yield f"{1e3 * median(gaps_s):.4g} ms of the {arm} arm's user TTFT are in none of its parts"
        if any(call.user_s > call.outer_s * (1 + ROUNDING) for call in calls):
            yield f"the {arm} arm's clock ran longer than the clock around it"


def figures_follow(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """Every figure of the row follows from its timed calls and builds."""
    for name, stored, again in wrong_figures(row, figures, evidence):
        yield f"{name} is stored as {number(stored)}, and the timed calls give {number(again)}"


def builds_measured(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """The build was measured at least three times."""
    if len(evidence.build_all_s) < LEAST_BUILDS:
        yield f"the build was measured {len(evidence.build_all_s)} times, and {LEAST_BUILDS} are needed"


def limit_is_plausible(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """The limit is a plausible share of what the independent forward pass took: the calibrated rates are not too high.

    A limit that is too low catches nothing. It is told for prefills long enough that overheads don't count. Where the
    hardware's card has a data sheet, no rate exceeds its rates.
    """
    seconds = [call.engine_s for call in _calls(evidence, BASELINE)]
    if figures.direct_limit_s is not None and figures.direct_limit_s <= 0:
        yield "the hardware's limit is 0: it holds no arm to anything"
    sheet, rates = row.conditions.get("data_sheet") or {}, row.conditions.get("rates") or {}
    for name in ("flop_per_s", "bytes_per_s"):
        if name in sheet and rates.get(name, 0.0) > MAX_OVER_DATA_SHEET * sheet[name]:
            yield f"the calibrated {name} is {rates[name] / sheet[name]:.3g} times the data sheet's"
    if not seconds or median(seconds) < LONG_S or (figures.direct_limit_s or 0.0) < SHORT_LIMIT_S:
        return
    assert figures.direct_limit_s is not None
    share = figures.direct_limit_s / median(seconds)
    if share < LEAST_LIMIT_SHARE:
        yield (
            f"the hardware's limit is {share:.1%} of {evidence.reference}: the calibrated rates are not plausible, "
            "or the machine was busy"
        )


def interleaved(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """Every round holds each arm once, one after the other, so that drift meets all of them."""
    calls = sorted(evidence.calls, key=lambda call: call.started_s)
    arms = {call.arm for call in calls}
    rounds = [calls[i : i + len(arms)] for i in range(0, len(calls), len(arms))]
    if any({call.arm for call in round_} != arms or len({call.round for call in round_}) > 1 for round_ in rounds):
        yield "the arms were not interleaved: a round does not hold each of them once"
    if any(b.started_s < a.started_s + a.outer_s * (1 - ROUNDING) for a, b in pairwise(calls)):
        yield "two calls overlap in time"
    orders = {tuple(call.arm for call in round_) for round_ in rounds}
    if len(rounds) >= BATCHES and len(arms) > 1 and len(orders) == 1:
        yield "the arms ran in the same order in every round"


def last_run_counts(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """The timed calls are an arm's last ones, and it was called no more often than the row tells.

    So no run of a cell was chosen by its result: a cell is measured once, or twice if it was disturbed, and the last
    run counts.
    """
    told = figures.measured_times or 1
    for arm in (row.arm, evidence.direct_arm):
        calls, made = _calls(evidence, arm), evidence.calls_made.get(arm)
        ordinals = [call.ordinal for call in calls if call.ordinal is not None]
        if made is None or not ordinals:
            continue
        if max(ordinals) != made or len(ordinals) != max(ordinals) - min(ordinals) + 1:
            yield f"the {arm} arm was called {made} times, and its timed calls are not the last of them"
        if not 0 <= made - told * len(calls) <= MAX_WARMUPS or told > MAX_RUNS:
            yield f"the {arm} arm was called {made} times, and the row tells of {told} x {len(calls)}"


def answers(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """The graded answers agree if the injection is exact, and the direct arm agrees with the independent forward."""
    if evidence.tolerance is None:
        yield "the answers were not graded"
        return
    if evidence.exact and row.equality in ("drifted", "diverged"):
        off = max(row.logit_max_abs_diff or 0.0, evidence.injected_off_reference or 0.0)
        what = "the answers diverge" if row.equality == "diverged" else "the answers have equal tokens"
        yield (
            f"{what}, and a logit is {off:.3g} off where rounding explains {evidence.tolerance:.3g}; "
            "the injection is exact"
        )
    if (evidence.direct_off_reference or 0.0) > evidence.tolerance:
        yield (
            f"a logit of the direct arm is {evidence.direct_off_reference:.3g} off that of {evidence.reference}, "
            f"and rounding explains {evidence.tolerance:.3g}"
        )


def timed_is_graded(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """What was timed is what was graded: the same tokens, and logits within the tolerance, in every round."""
    for arm in (row.arm, evidence.direct_arm):
        if evidence.first_token_margins.get(arm, 0.0) > 2 * (evidence.tolerance or 0.0):
            yield f"the {arm} arm's timed call returned another token than its graded answer begins with"
    if not evidence.exact:
        return
    for injected, direct in _rounds(evidence, row.arm, evidence.direct_arm):
        apart = injected.logits_apart
        if apart is None and injected.token != direct.token:
            yield f"in round {injected.round} the two arms returned different tokens"
            return
        if apart is not None and evidence.tolerance is not None and apart > evidence.tolerance:
            yield (
                f"in round {injected.round} a logit of the timed {row.arm} call is {apart:.3g} off, and rounding "
                f"explains {evidence.tolerance:.3g}"
            )
            return


def stored_kv(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """The stored keys and values are those of the independent forward pass on the same tokens."""
    off, allowed = evidence.kv_off_reference, evidence.kv_tolerance
    if evidence.exact and off is not None and allowed is not None and off > allowed:
        yield f"the stored KV of a token is {off:.3g} off (relative), and rounding explains {allowed:.3g}"
    scale, most = evidence.kv_scale_off, evidence.kv_scale_tolerance
    if evidence.exact and scale is not None and most is not None and scale > most:
        yield f"the stored KV of a layer is {1 + scale:.4g} or {1 - scale:.4g} times what it should be"


def view_is_stored(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """What an answer is given is the stored memory, bit by bit."""
    if evidence.exact and (evidence.view_off_stored or 0.0) > 0:
        yield f"the view that an answer is given is up to {evidence.view_off_stored:.3g} off the stored memory"


def returned_kv(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """A tier that is exact gives back, to the bit, the keys and values that were stored in it."""
    if evidence.exact and evidence.kv_off_built not in (None, 0.0):
        yield f"the tensors from {row.arm} differ from the built ones: a token's KV is {evidence.kv_off_built:.3g} off"


def stated_loss(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """A method that is not exact loses no more than it states: in its KV, in likelihood and in agreement.

    With random weights only the KV is judged, because no text is likelier than another.
    """
    loss = evidence.loss
    if loss is None:
        return
    # A NaN is beyond every bound.
    if not loss.kv_off <= loss.most_kv_off:
        yield (
            f"{loss.method} states a KV at most {loss.most_kv_off:.3g} off (relative), and a token's is "
            f"{loss.kv_off:.3g}"
        )
    if row.weights == RANDOM_WEIGHTS:
        return
    if loss.nll_above is not None and not loss.nll_above <= loss.most_nll_above:
        yield (
            f"{loss.method} states a loss of at most {loss.most_nll_above:.3g} nats a token, and it is "
            f"{loss.nll_above:.3g}"
        )
    if loss.agreement_pct is not None and not loss.agreement_pct >= loss.least_agreement_pct:
        yield (
            f"{loss.method} states that at least {loss.least_agreement_pct:.3g}% of the next tokens are those of the "
            f"exact memory, and {loss.agreement_pct:.3g}% are"
        )


def fetch_limit(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """No fetch that reads bytes is faster than this machine can read them."""
    if evidence.least_fetch_s is None:
        return
    fetch_s = median(call.cache_s for call in _calls(evidence, row.arm))
    if fetch_s < evidence.least_fetch_s:
        yield (
            f"the fetch from {row.arm} took {1e3 * fetch_s:.4g} ms, and reading its bytes takes at least "
            f"{1e3 * evidence.least_fetch_s:.4g} ms"
        )


def loss_is_measured(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """The loss of a method that is not exact was scored."""
    if evidence.loss is not None and (evidence.loss.nll_above is None or evidence.loss.agreement_pct is None):
        yield f"the memory is too short to score what {evidence.loss.method} loses"


def refers_to_valid(row: Row, *evidence: object) -> Iterator[str]:
    """The arms and rows that figures of the row are made from are valid themselves."""
    if isinstance(row.payload, DerivedPayload):
        for name, verdict in row.payload.refers_to.items():
            if verdict != "ok":
                yield f"its figures are made from those of {name}, which is {verdict}"


def scenario_rules(row: Row, *evidence: object) -> Iterator[str]:
    """The rules of the row's own scenario."""
    if isinstance(row.payload, DerivedPayload):
        yield from row.payload.failures(row)


def pairs_setting(row: Row) -> str:
    """The setting by which a row gets more pairs."""
    settings = {"tiers": "scenario.repeats", "storage": "scenario.repeats", "reuse_trace": REPLAY_USES}
    return settings.get(row.scenario, "scenario.pairs")


def enough_pairs(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """An interval needs 6 pairs."""
    if row.pairs < BATCHES:
        setting = pairs_setting(row)
        more = "a larger number" if setting == REPLAY_USES else f"{BATCHES} or more"
        yield f"{row.pairs} pairs give no interval; use {setting}={more}"


def calm(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """Neither arm was disturbed in the run that counts."""
    for arm in (row.arm, evidence.direct_arm):
        share = spread(_comparable(evidence, arm))
        if share > NOISY_SPREAD:
            yield f"the {arm} arm was disturbed: its interquartile range is {share:.0%} of its median"


def steady(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """The ratio of the arms does not drift, by Kendall's rank correlation with the round."""
    pairs = zip(_comparable(evidence, row.arm), _comparable(evidence, evidence.direct_arm), strict=True)
    ratios = [a / b for a, b in pairs]
    if len(ratios) < BATCHES:
        return
    third = len(ratios) // 3
    change = median(ratios[-third:]) / median(ratios[:third]) - 1
    if abs(change) > MAX_DRIFT and stats.kendalltau(range(len(ratios)), ratios).pvalue < CHANCE_OF_DRIFT:
        yield f"the {row.arm} arm drifted by {change:+.0%} against the direct arm while it was measured"


def build_is_clear(row: Row, figures: TTFTPayload, evidence: Evidence) -> Iterator[str]:
    """Build and direct arm, which are not measured in the same rounds, agree by their medians too.

    And a build takes no more than the direct arm, which computes more tokens, by `MAX_BUILD_OVER_DIRECT`, beside the
    time of writing its file at `LEAST_WRITE_BYTES_PER_S`.
    """
    if reason := direct_too_slow(figures.direct_ttft_s, figures.build_s, figures.kv_ttft_s, figures.merge_s or 0.0):
        yield reason
    if reason := _build_too_slow(row, figures.build_s, figures.direct_ttft_s, evidence.written_bytes):
        yield reason


def baseline_is_clear(row: Row, figures: Timed, evidence: Evidence) -> Iterator[str]:
    """The direct arm's ratio to the independent forward pass is not above 1.05 by its median."""
    ratio, interval = _over_baseline(evidence)
    most = evidence.most_over_baseline or MAX_OVER_BASELINE
    if interval is not None and ratio > most >= interval[0]:
        yield f"the direct arm took {ratio:.2f} times {evidence.reference}, too noisy to tell from {most}"


Rule = Callable[["Row", "TTFTPayload", "Evidence"], Iterator[str]]
RULES: tuple[Rule, ...] = (
    same_prompt,
    hit_length,
    tokens_computed,
    products_computed,
    limit,
    floor,
    baseline,
    peer,
    build,
    figures_follow,
    clocks,
    interleaved,
    last_run_counts,
    answers,
    timed_is_graded,
    stored_kv,
    view_is_stored,
    returned_kv,
    stated_loss,
    fetch_limit,
    scenario_rules,
)
DOUBTS: tuple[Rule, ...] = (
    enough_pairs,
    builds_measured,
    calm,
    steady,
    limit_is_plausible,
    build_is_clear,
    baseline_is_clear,
    loss_is_measured,
    refers_to_valid,
)


def _build_too_slow(row: Row, build_s: float, direct_s: float, written_bytes: int) -> str | None:
    write_s = written_bytes / LEAST_WRITE_BYTES_PER_S
    if row.memories > 1 or build_s <= MAX_BUILD_OVER_DIRECT * direct_s + BUILD_SLACK_S + write_s:
        return None
    file = f", and its file can be written in {write_s:.4g} s" if written_bytes else ""
    return f"the build took {build_s:.4g} s, and the direct arm computes more in {direct_s:.4g} s{file}"


def _calls(evidence: Evidence, arm: str) -> list[TimedCall]:
    return sorted((call for call in evidence.calls if call.arm == arm), key=lambda call: call.round)


def _comparable(evidence: Evidence, arm: str) -> list[float]:
    """An arm's seconds by round, of which only noise differs.

    Where rounds have prompts of several lengths, as in a trace, they are multiples of what another arm takes for as
    many computed tokens, by a line through all of its calls (Theil and Sen's): of the query alone for an arm with hits,
    and of the independent forward pass for the direct arm. One call of the same round would bring its own noise.
    """
    calls = _calls(evidence, arm)
    seconds = [call.engine_s for call in calls]
    if len({call.prompt_tokens for call in calls}) == 1:
        return seconds
    beside = _calls(evidence, BASELINE if arm == evidence.direct_arm else ALONE)
    if not beside:
        return seconds
    other_s, tokens = [call.engine_s for call in beside], [_computed(call) for call in beside]
    slope, start = 0.0, median(other_s)
    if len(set(tokens)) > 1:
        slope, start = stats.theilslopes(other_s, tokens)[:2]
    return [call.engine_s / max(start + slope * _computed(call), min(other_s)) for call in calls]


def _computed(call: TimedCall) -> int:
    return call.prompt_tokens - call.cached_tokens


def _rounds(evidence: Evidence, a: str, b: str) -> list[tuple[TimedCall, TimedCall]]:
    return list(zip(_calls(evidence, a), _calls(evidence, b), strict=True))


def _over_baseline(evidence: Evidence) -> tuple[float, Interval | None]:
    return _over(evidence, evidence.direct_arm, BASELINE)


def _over(evidence: Evidence, arm: str, other: str) -> tuple[float, Interval | None]:
    """An arm's seconds, less `slack_s`, over those of the other in the same rounds; 1 where the other was not timed."""
    other_s = [call.engine_s for call in _calls(evidence, other)]
    if not other_s:
        return 1.0, None
    return paired_ratio([call.engine_s - evidence.slack_s for call in _calls(evidence, arm)], other_s)


def number(value: float | None) -> str:
    """A figure in a reason."""
    return "none" if value is None else f"{value:.6g}"


def clock_misses(outer_s: Sequence[float], own_s: Sequence[float]) -> str | None:
    """How much of the clock around calls their own clock misses, if it is more than `MAX_LOST_SHARE`.

    None also for fewer than 6 calls.
    """
    if len(outer_s) < BATCHES:
        return None
    whole_s = median(outer_s)
    lost_s = median(outer - own for outer, own in zip(outer_s, own_s, strict=True))
    if lost_s <= max(MAX_LOST_SHARE * whole_s, LOST_SLACK_S):
        return None
    return f"{1e3 * lost_s:.4g} ms of the {1e3 * whole_s:.4g} ms"


def beats_limit(arm: str, ttft_s: float, limit_s: float) -> str | None:
    if ttft_s >= limit_s:
        return None
    return f"the {arm} arm took {1e3 * ttft_s:.4g} ms, and the hardware needs {1e3 * limit_s:.4g} ms for this work"


def direct_too_slow(direct_s: float, build_s: float, kv_s: float, merge_s: float = 0.0) -> str | None:
    if direct_s <= MAX_DIRECT_RATIO * (build_s + merge_s + kv_s):
        return None
    work, seconds = ("build, merge", f"{build_s:.4g} + {merge_s:.4g}") if merge_s else ("build", f"{build_s:.4g}")
    return (
        f"the direct baseline is too slow: it took {direct_s:.4g} s for the work of {work} and injected arm, "
        f"which took {seconds} + {kv_s:.4g} s"
    )
