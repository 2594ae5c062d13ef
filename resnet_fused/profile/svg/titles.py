# SPDX-License-Identifier: BSD-3-Clause
"""What a picture says in words: of a layer, of a row, of the whole."""

from __future__ import annotations

from resnet_fused.profile.result import Layer, Profile, Row, disturbed, replaced


def milliseconds(ms: float) -> str:
    """A time with three digits."""
    return f"{ms:.3g} ms" if ms < 100 else f"{ms:.0f} ms"


def of_layer(layer: Layer, profile: Profile) -> str:
    """A layer and its figures."""
    share = layer.share(profile.peaks)
    parts = [f"{layer.name} ({layer.kind}, {layer.path}): {milliseconds(layer.ms)}"]
    if layer.work.flop and layer.tflops is not None:
        parts.append(f"{layer.tflops:.3g} TFLOP/s")
    if layer.gbs is not None and share is not None:
        parts.append(f"{layer.gbs:.3g} GB/s")
        parts.append(f"{share:.0%} of the {layer.bound(profile.peaks)} peak")
    return ", ".join(parts)


def of_row(row: Row, profile: Profile) -> str:
    """A fused layer and what it replaces."""
    text = of_layer(row.layer, profile)
    if row.eager:
        text += f"\nreplaces {replaced(row.eager)}: eager {milliseconds(row.eager_ms)}"
        text += f", {row.ratio}" if row.ratio else ""
    return text


def heading(profile: Profile) -> str:
    """What was measured and what came out."""
    f = profile.facts
    ratio = profile.ratio
    outcome = f"{ratio.value:.2f} times as fast as eager"
    if not ratio.beyond_noise:
        outcome = f"as fast as eager within noise ({ratio})"
    return f"{f['model']}, {f['dtype']}, batch {f['batch']}: fused {outcome}"


def setting(profile: Profile) -> str:
    """On what, and with what, it was measured."""
    f = profile.facts
    threads = f"{f['threads']} thread{'' if f['threads'] == 1 else 's'}"
    where = str(f["device"]).replace("(R)", "").replace("(TM)", "")
    if not f.get("cuda"):
        where += f", {threads}, {f['cpu_capability']}{' and AMX' if f['amx'] else ''}"
    busy = disturbed(profile)
    return f"{f['size']} pixels; {where}; {f['versions']}" + (f"; {busy}" if busy else "")


def totals(profile: Profile) -> str:
    """The whole models' times, and how they were taken."""
    batch, fused, eager = profile.facts["batch"], profile.fused, profile.eager
    rate = "" if fused.ms <= 0 else f" ({1e3 * batch / fused.ms:.3g} images/s)"
    return (
        f"eager {milliseconds(eager.ms)}, fused {milliseconds(fused.ms)}{rate}, medians of "
        f"{profile.ratio.rounds} rounds. Layers: other calls, with a clock that costs "
        f"eager {eager.overhead:+.0%}, fused {fused.overhead:+.0%}"
    )
