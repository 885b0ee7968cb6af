"""What the committed results of each benchmark say: rows of what was measured and the figure, as text."""

from statistics import mean
from typing import Any

from benchmarks.zoo import failures_of

Results = dict[str, Any]
Row = tuple[str, str]


def zoo(found: Results) -> list[Row]:
    """How many architectures of the sweep pass every check."""
    passed = sum(not failures_of(result) for result in found["results"])
    peers = [result["peer"] for result in found["results"] if result.get("peer")]
    ran = sum(not peer["failure"] for peer in peers)
    what = f"architectures pruned to {found['settings']['macs']:.0%} of their MACs that pass every check"
    peer = f"(Torch-Pruning {found['versions']['torch-pruning']}, half of the channels, runs afterwards: {ran})"
    return [(what, f"[{passed} of {len(found['results'])}](docs/zoo.md) {peer if peers else ''}".strip())]


def exactness(found: Results) -> list[Row]:
    """The largest difference of any model, and how close to the budget they end."""
    examined = [result for result in found["results"] if "exact" in result]
    passed = sum(not result["failure"] for result in found["results"])
    error = max(result["max_abs_error"] for result in examined)
    kept = [result["macs_kept"] for result in examined]
    what = f"exactness at {found['settings']['macs']:.0%} of the MACs: pruned model against masked twin, float64"
    figure = f"{passed} of {len(found['results'])} models; largest error {error:.1e}"
    return [(what, f"{figure}; MACs kept {min(kept):.2%} to {max(kept):.2%}")]


def trace(found: Results) -> list[Row]:
    """A row for each model, in seconds."""
    rows = []
    for result in found["results"]:
        ours, theirs = result["median_seconds"]["prunus"], result["median_seconds"].get("torch-pruning")
        first = result["first_seconds"]["prunus"]["trace"]
        figure = f"{ours['trace']:.2f} s (first call {first:.2f} s), "
        figure += f"{ours['plan'] + ours['apply']:.2f} s, {ours['verify']:.2f} s"
        if theirs:
            peer = f"Torch-Pruning {found['versions']['torch-pruning']}"
            figure += f" ({peer}: {theirs['trace']:.2f} s, {theirs['plan + apply']:.2f} s, verifies nothing)"
        name = _name(result["model"])
        rows.append((f"{name} on one core: trace, plan and apply, verify", figure))
    return rows


def rounds(found: Results) -> list[Row]:
    """Before and after rounds of pruning and training."""
    settings, rounds = found["settings"], found["rounds"]
    what = (
        f"{_name(settings['model'])} to {rounds[-1]['macs_kept']:.0%} of the MACs, "
        f"{settings['rounds']} rounds of {settings['epochs']} epochs"
    )
    return [(what, f"{rounds[0]['accuracy']:.2%} -> {rounds[-1]['accuracy']:.2%} test accuracy")]


def no_training(found: Results) -> list[Row]:
    """A row for each budget: pruned by ``reconstruction``."""
    rows = []
    for row in found["rows"]:
        if row["method"] == "reconstruction, recovered":
            name = _name(row["model"])
            what = (
                f"{name} to {row['macs_kept']:.1%} of the MACs without training, {found['settings']['images']} images"
            )
            rows.append((what, f"{row['accuracy']:.2%} test accuracy"))
    return rows


def shrunk(found: Results) -> list[Row]:
    """A row for each model and budget: of each method the mean over draws of images."""
    done = [row for row in found["rows"] if "budget" in row and "accuracy" in row]
    rows = []
    for model, budget in sorted({(row["model"], row["budget"]) for row in done}, key=lambda key: (key[0], -key[1])):
        texts = []
        for method in ("shrink", "factorize", "prune"):
            key = (model, budget, method)
            values = [row["accuracy"] for row in done if (row["model"], row["budget"], row["method"]) == key]
            texts += [f"{mean(values):.2%} ({method}, draws: {len(values)})"] if values else []
        what = f"{_name(model)} to {budget:.1%} of the MACs without training, {found['settings']['images']} images"
        rows.append((what, f"test accuracy: {', '.join(texts)}"))
    return rows


def retrained(found: Results) -> list[Row]:
    """A row for each budget: means over seeds, beside the best of the peer."""
    accuracies: dict[tuple[str, float], dict[str, list[float]]] = {}
    for row in found["rows"]:
        if "seed" in row:
            by_method = accuracies.setdefault((row["model"], row["budget"]), {})
            by_method.setdefault(row["method"], []).append(row["accuracy"])
    rows = []
    for (model, budget), methods in accuracies.items():
        means = {name: mean(values) for name, values in methods.items()}
        what = f"{_name(model)} to {budget:.1%} of the MACs, {found['settings']['epochs']} epochs in all"
        names = {"ours": "prune", "shrink": "shrink"}
        own = [f"{means.pop(n):.2%} ({names[n]}, seeds: {len(methods[n])})" for n in ("shrink", "ours") if n in means]
        figure = f"test accuracy: {', '.join(own)}" if own else ""
        peers = {name: value for name, value in means.items() if "+" not in name}
        if best := max(peers, key=peers.__getitem__, default=None):
            figure += f"; Torch-Pruning's best ({best}): {peers[best]:.2%} (seeds: {len(methods[best])})"
        rows.append((what, figure.removeprefix("; ")))
    return rows


def school(found: Results) -> list[Row]:
    """For each part to train on the best model, one with a known figure, and the plainest; then all of them."""
    best, every = [], []
    for part in sorted({row["train"] for row in found["summary"]}, reverse=True):
        own = [row for row in found["summary"] if row["train"] == part]
        splits = max(row["splits"] for row in own)  # a model that lacks some, since a run was interrupted, is left out
        own = sorted((row for row in own if row["splits"] == splits), key=lambda row: -row["explained"])
        explained = {row["model"]: row["explained"] for row in own}
        alone, deviations = explained["independent ridge"], explained["trace norm of deviations"]
        figure = f"{own[0]['explained']:.1%} ({own[0]['model']}), {deviations:.1%} (trace norm of deviations)"
        best.append(
            (f"School data, variance explained from {part:.0%} of the students", f"{figure}, {alone:.1%} (each alone)")
        )
        every += [
            (f"from {part:.0%}, {row['model']}", f"{row['explained']:.2%}, deviation over {splits} splits "
             f"{row['deviation']:.2%}; by the variance within schools {row['within']:.2%}")
            for row in own
        ]  # fmt: skip
    return best + every


def omniglot(found: Results) -> list[Row]:
    """For each number of drawings the best way of sharing that all seeds have; then all of them, the best first."""
    best, every = [], []
    for drawings in sorted({line["drawings"] for line in found["summary"]}):
        lines = {line["arm"]: line for line in found["summary"] if line["drawings"] == drawings}
        alone = lines.get("single-task", {"seeds": 0})
        gains = [line for line in lines.values() if "gain" in line and line["seeds"] == alone["seeds"]]
        number = f"{drawings} drawing{'s' if drawings > 1 else ''}"
        rows = []
        for line in sorted(gains, key=lambda line: -line["gain"]):
            gain, low, high = (f"{100 * line[name]:+.1f}" for name in ("gain", "gain_low", "gain_high"))
            points = f"{gain} points ({low} to {high}, seeds: {line['seeds']})"
            rows.append((line["arm"], f"{line['accuracy']:.1%}", points))
        for arm, accuracy, points in rows[:1]:
            figure = f"{accuracy} ({arm}), {alone['accuracy']:.1%} (a network per alphabet): {points}"
            best.append((f"Omniglot, accuracy from {number} of a character", figure))
        every += [(f"from {number}, {arm}", f"{accuracy}: {points}") for arm, accuracy, points in rows]
    return best + every


def weighting_step(found: Results) -> list[Row]:
    """Ratios of times."""
    ratios = found["ratios"]
    rows = [
        ("a step of `mtl.fit` with uncertainty weighting, by a loop written by hand", f"{ratios['uncertainty']:.2f}")
    ]
    for method, name in (("upgrad", "UPGrad"), ("pcgrad", "PCGrad")):
        if f"{method} over plain sum" in ratios:
            ours, theirs = ratios[f"{method} over plain sum"], ratios[f"torchjd's {method} over plain sum"]
            figure = f"{ours:.2f} (torchjd {found['versions']['torchjd']} by its documentation: {theirs:.2f})"
            rows.append(
                (f"a step with {name}, by one with the plain sum of {found['settings']['tasks']} losses", figure)
            )
    return rows


def soft_sharing(found: Results) -> list[Row]:
    """Ratios of times."""
    step, penalty, settings = found["step"], found["penalty"], found["settings"]
    what = f"time of a step of soft sharing, {settings['tasks']} ResNet-20s at batch {settings['batch']}"
    figure = f"{step['ratio']:.2f}, with trace norm {step['ratio_with_penalty']:.2f}"
    error = penalty["largest_relative_error_of_gradient"]
    speedup = f"{penalty['speedup']:.1f} times faster, largest error {error:.0e}"
    return [
        (f"{what}, relative to a loop over the models", figure),
        ("the trace norm of these stacks and its gradient, against `torch.linalg.svd`", speedup),
    ]


def collapsed(found: Results) -> list[Row]:
    """Parameters and accuracy."""
    kept, before, after = (
        found["collapse"][name]["mean"] for name in ("parameters_kept", "accuracy_before", "accuracy_after")
    )
    what = "five digits networks trained with the trace norm of deviations, collapsed"
    seeds = found["settings"]["seeds"]
    return [(what, f"{kept:.0%} of the parameters, {before:.2%} -> {after:.2%} accuracy (seeds: {seeds})")]


def inference(found: Results) -> list[Row]:
    """Over all models, and a row for each model, batch and number of threads."""
    summary, results = found["summary"], found["results"]
    rows = [
        (
            "`layers.optimize_for_inference` with PyTorch alone, by the best of PyTorch's own ways to run "
            f"{len({result['model'] for result in results})} CNNs on 1 and 2 threads",
            f"{summary['torch_against_best_of_pytorch']:.2f} times as fast (least "
            f"{summary['torch_against_best_of_pytorch_least']:.2f}); by eager at least "
            f"{summary['torch_against_eager_least']:.2f}",
        )
    ]
    for result in results:
        name, times = _name(result["model"]), result["milliseconds"]
        figure = ", ".join(f"{way} {value:.3g}" for way, value in times.items())
        chosen = f"{figure} ({', '.join(result['auto_chose'])})"
        rows.append((f"{name}, batch {result['batch']}, threads: {result['threads']}; milliseconds", chosen))
    return rows


def training_step(found: Results) -> list[Row]:
    """How much faster, and the accuracy that both reach."""
    speed, accuracy = found["times_as_fast_as_eager"]["fit"], found["accuracy"]
    what = "a step of `mtl.fit` as it chooses on this CPU (bfloat16, channels-last), by eager"
    equal = f"accuracy after the same epochs {accuracy['fit']:.1%}, eager {accuracy['eager']:.1%}"
    return [(what, f"{speed:.2f} times as fast; {equal}")]


def memory(found: Results) -> list[Row]:
    """A row for each model: what is kept for the backward pass, and the time of a step, by eager."""
    rows = []
    for name, ways in found["models"].items():
        others = [f"{way} {own['kept']:.2f} at {own['time']:.2f}" for way, own in ways.items() if way != "eager"]
        rows.append((f"training {name}: memory kept for the backward pass at time, by eager", "; ".join(others)))
    return rows


def latency(found: Results) -> list[Row]:
    """Of each model and batch what is left of the time, by kind of budget."""
    rows = []
    for model, batch in dict.fromkeys((result["model"], result["batch"]) for result in found["results"]):
        own = [result for result in found["results"] if (result["model"], result["batch"]) == (model, batch)]
        figure = "; ".join(f"{result['budget']}: {result['ratio']:.2f}" for result in own)
        rows.append((f"{_name(model)}, batch {batch}: time that is left by budget", figure))
    return rows


def evidence(found: Results) -> list[Row]:
    """A row for each model and batch."""
    return [
        (
            f"{_name(result['model'])}, batch {result['batch']}: a pass with evidence by a forward pass",
            f"activations {result['ratio']['activations']:.2f}, with Gram matrices {result['ratio']['with Grams']:.2f}",
        )
        for result in found["results"]
    ]


def recurrent(found: Results) -> list[Row]:
    """A row for each layer: a step's time by that of packed sequences."""
    rows = []
    for result in found["results"]:
        ours, packed = result["median_seconds"]["ours"], result["median_seconds"]["packed"]
        ratios = ", ".join(f"{name} {ours[name] / packed[name]:.2f}" for name in ours)
        rows.append((f"`layers.{result['layer']}` over padded batches by packed sequences of torch.nn", ratios))
    return rows


def whitening(found: Results) -> list[Row]:
    """A row for each model: the outputs' error by that of the raw SVD."""
    return [
        (
            f"{line['model']}: outputs' error of whitened by raw SVD, {line['layers']} layers, inputs not seen",
            f"mean {line['mean_ratio_on_fresh']:.2g}, worst {line['worst_ratio_on_fresh']:.2g}",
        )
        for line in found["summary"]
    ]


def criteria(found: Results) -> list[Row]:
    """A row for each model and budget: all ways, the best first."""
    done = [row for row in found["rows"] if "budget" in row and "accuracy" in row]
    done.sort(key=lambda row: -row["accuracy"])
    rows = []
    for model, budget in dict.fromkeys((row["model"], row["budget"]) for row in done):
        own = [row for row in done if (row["model"], row["budget"]) == (model, budget)]
        figure = "; ".join(f"{row['method']} {row['accuracy']:.1%}" for row in own)
        rows.append((f"{_name(model)} to {budget:.1%} of the MACs without training, by criterion", figure))
    return rows


def spared(found: Results) -> list[Row]:
    """The worst task's loss by way of combining, mean over seeds."""
    part = found["balanced"]
    losses = ", ".join(f"{100 * value:.1f} ({arm})" for arm, value in part["worst_drop"].items())
    what = f"8 alphabets in one network at {found['settings']['macs']:.0%} of the MACs: points that the worst one loses"
    return [
        (what, f"{losses}; balanced by mixed {part['ratio']['balanced']:.2f} (seeds: {found['settings']['seeds']})")
    ]


def stack(found: Results) -> list[Row]:
    """Before, and after collapsing and pruning."""
    runs = found["stack"]["runs"]
    before, after, kept = (mean(run[name] for run in runs) for name in ("stack", "pruned", "pruned_params"))
    what = "five coupled digits networks, collapsed and then pruned without training"
    return [(what, f"{kept:.1%} of the parameters, {before:.2%} -> {after:.2%} accuracy (seeds: {len(runs)})")]


def _name(model: str) -> str:
    """Without where it is from."""
    return model.rpartition(":")[2]
