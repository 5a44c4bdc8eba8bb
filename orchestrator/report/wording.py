"""How metrics, numbers and configurations are said in words; the page and the terminal agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.metrics import SHARES

UNITS = {"ms": "ms", "mb": "MB", "s": "s"}
LABELS = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "f1": "F1",
    "kv_cache_mb": "KV cache (MB)",
    "macs": "multiply-accumulates",
    "num_params": "parameters",
    "rouge_l": "ROUGE-L",
    "speedup": "speed-up",
    "tokens_per_s": "tokens/s",
    "tpot_ms": "time per token (ms)",
    "ttft_ms": "time to first token (ms)",
}
COUNTS = frozenset({"macs", "num_params"})
LIKE_DENSE = 1.05  # times
NOTHING = "–"
MINUS = "−"


def unit(metric: str) -> str:
    """The unit that a metric's name ends in, "" for a pure number."""
    return "" if metric == "tokens_per_s" else UNITS.get(metric.rpartition("_")[2], "")


def label(metric: str) -> str:
    """A metric's name for people: `latency_ms` is "latency (ms)"."""
    if metric in LABELS or not unit(metric):
        return LABELS.get(metric, metric.replace("_", " "))
    return f"{metric.rpartition('_')[0].replace('_', ' ')} ({unit(metric)})"


def number(metric: str, value: float | None) -> str:
    """A value to the digits that matter, without its unit."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if metric in SHARES:
        return f"{value:.3f}"
    if metric in COUNTS:
        return _with_prefix(value)
    return _three_digits(value)


def with_unit(metric: str, value: float | None) -> str:
    """A metric and its value in running text: "latency 5.38 ms"."""
    named, its_unit = label(metric), unit(metric)
    return f"{named.removesuffix(f' ({its_unit})')} {number(metric, value)} {its_unit}".rstrip()


def interval(metric: str, pair: Sequence[float] | None) -> str:
    """A 95 % interval as "0.86–0.90", "" where there is none."""
    return f"{number(metric, pair[0])}–{number(metric, pair[1])}" if pair else ""


def compare(metric: str, value: float | None, dense: float | None) -> str:
    """A value beside the dense model's: "3.9× smaller", "−0.4 points", "" for the same value."""
    if value is None or dense is None or value == dense or metric == "speedup":
        return ""
    if metric in SHARES:
        return f"{_signed(100 * (value - dense), 1)} points"
    if unit(metric) and value > 0 and dense > 0:
        better, worse = (
            ("faster", "slower") if unit(metric) in ("ms", "s") else ("smaller", "larger")
        )
        times = dense / value if value < dense else value / dense
        if times < LIKE_DENSE:
            return "like dense"
        return f"{times:.1f}× {better if value < dense else worse}"
    if metric in COUNTS:
        return f"{100 * value / dense:.0f}% of dense" if dense else ""
    return f"{_signed(value - dense, 2)}"


def versus_dense(metric: str, metrics: Mapping[str, float], dense: Mapping[str, float]) -> str:
    """`compare` for one metric of a point; a latency by the speed-up that was taken interleaved.

    Two latencies taken at different times differ by what else the machine did, too.
    """
    value, speedup = metrics.get(metric), metrics.get("speedup")
    is_dense = value == dense.get(metric)
    if metric == "latency_ms" and value is not None and speedup is not None and not is_dense:
        return compare(metric, value, speedup * value)
    return compare(metric, value, dense.get(metric))


def duration(seconds: float) -> str:
    """Seconds as a person says them: "38 s", "4 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def target(options: Mapping[str, Any]) -> str:
    """Where an artifact is served, in one line."""
    threads = options.get("threads", 1)
    return (
        f"{options.get('runtime')} on {options.get('device')}, {threads} thread"
        f"{'' if threads == 1 else 's'}, batch {options.get('batch_size', 1)}"
    )


def describe(config: Mapping[str, Any], *, shown: Collection[str] = ()) -> str:
    """One line for a TrialConfig in plain data: "heads 50%, neurons 50%, W8A8 QAT, 3 epochs".

    `shown` are paths of options that are said with their values besides.
    """
    parts = [words for method in config.get("prune", ()) for words in _pruning(method)]
    parts += _quantization(config.get("quantize", {}))
    compressed = bool(parts)
    parts += _training(config.get("finetune", {}))
    if config.get("seed"):
        parts.append(f"seed {config['seed']}")
    model = f"{config['model']}: " if "model" in shown else ""
    options = _flat({key: value for key, value in config.items() if key not in ("model", "seed")})
    parts += [f"{_leaf(path)} {_short(options[path])}" for path in shown if path in options]
    return model + ", ".join(parts if compressed else ["dense", *parts])


def telling_apart(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Paths of the options in which configurations differ that `describe` says in the same words."""
    models, alike = set(), dict[str, list[dict[str, Any]]]()
    for config in configs:
        models.add(config.get("model"))
        alike.setdefault(describe(config), []).append(_flat(config))
    differing = {
        path
        for first, *others in alike.values()
        for other in others
        for path in {*first, *other}
        if first.get(path) != other.get(path)
    }
    return sorted(differing - {"model"} | ({"model"} if len(models) > 1 else set()))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested plain data as {path: value}."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        return {path: value}
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= _flat(inner, f"{path}.{key}".lstrip("."))
    return found


def _leaf(path: str) -> str:
    return next(key for key in reversed(path.split(".")) if not key.isdecimal())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _pruning(options: Mapping[str, Any]) -> Iterator[str]:
    method = options.get("method", "none")
    if method == "none":
        return
    groups = [name for name in ("heads", "neurons", "layers") if options.get(name)]
    yield from (f"{name} {_sparsity(options[name])}" for name in groups)
    if not groups:
        name = "" if method == "n_m" else method.replace("_", " ")
        yield f"{name} {_amount(options)}".strip()
    if options.get("importance") == "random":
        yield "random choice"
    if options.get("schedule") in ("gradual", "after"):
        yield {"gradual": "gradually", "after": "after training"}[options["schedule"]]


def _amount(options: Mapping[str, Any]) -> str:
    """How much a method removes, by the option that says so."""
    if "n" in options and "m" in options:
        return f"{options['n']}:{options['m']}"
    if options.get("threshold") is not None:
        return f"{options['threshold']:g}{' σ' if options.get('unit') == 'std' else ''}"
    if options.get("vocab_size") is not None:
        return f"{options['vocab_size']:,}"
    share = _sparsity(options["sparsity"]) if options.get("sparsity") is not None else ""
    return f"{share} overall" if options.get("scope") == "global" else share


def _sparsity(value: Any) -> str:
    """A share in percent; an allocation by layer is only named."""
    if isinstance(value, int | float):
        return f"{100 * value:.3g}%"
    return "by layer"


def _quantization(options: Mapping[str, Any]) -> Iterator[str]:
    scheme = options.get("scheme", "none")
    if scheme == "none":
        return
    name = scheme
    if scheme == "linear" and options.get("interval") is not None:
        name = f"linear q={options['interval']:g}"
    yield f"{name} {'QAT' if options.get('qat') else 'PTQ'}" if name != "bf16" else name
    if options.get("embeddings"):
        yield "int8 embeddings"


def _training(options: Mapping[str, Any]) -> Iterator[str]:
    steps, epochs = options.get("max_steps"), options.get("num_train_epochs")
    if steps == 0 or (steps is None and epochs == 0):
        yield "not trained"
        return
    if steps is not None:
        yield f"{steps} steps"
    elif epochs is not None:
        yield f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    if options.get("learning_rate") is not None:
        yield f"lr {options['learning_rate']:.3g}".replace("e-0", f"e{MINUS}")
    if options.get("distillation"):
        yield "distilled"


def _three_digits(value: float) -> str:
    """Three significant digits, all digits of larger whole numbers, no exponent where avoidable."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _with_prefix(value: float) -> str:
    """A count with k, M, G or T."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{_three_digits(value / factor)} {prefix}"
    return f"{value:.0f}"


def _signed(value: float, digits: int) -> str:
    """A difference with its sign; zero after rounding has none."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else MINUS}{text}"
