"""Explanations beside captum's: seconds and error to exact values at the same number of model evaluations.

A ReLU network of the size that the paper uses for HELOC (23 features) and 1000 evaluations a point; the errors are
measured with 12 features, where all 4096 masks give the exact answer.
"""

import statistics

import torch

from benchmarks.harness import Comparison, compare, growth
from locally.tangent.explanation import Method, explain

SAMPLES = 1000


def main() -> list[Comparison]:
    from captum import attr
    from captum._utils.models.linear_model import SkLearnLinearRegression
    from captum.attr._core.lime import get_exp_kernel_similarity_function

    model = network(23)
    points = torch.rand(4, 23, generator=torch.Generator().manual_seed(0))
    kernel = get_exp_kernel_similarity_function("euclidean", kernel_width=1.0)

    def lime(f: torch.nn.Module, x: torch.Tensor, n: int, **options: int) -> torch.Tensor:
        peer = attr.Lime(f, interpretable_model=SkLearnLinearRegression(), similarity_func=kernel)
        return peer.attribute(x, target=0, n_samples=n, **options)

    def shap(f: torch.nn.Module, x: torch.Tensor, n: int, **options: int) -> torch.Tensor:
        return attr.KernelShap(f).attribute(x, target=0, n_samples=n, **options)

    results = []
    for method, peer in (("lime", lime), ("kernel_shap", shap)):
        ours = lambda method=method: explain(model, points, method, n_samples=SAMPLES)
        for name, options in (("captum", {}), ("captum, batched", {"perturbations_per_eval": SAMPLES})):
            theirs = lambda peer=peer, options=options: peer(model, points, SAMPLES, **options)
            title = f"{method}, 4 points x 23 features x {SAMPLES}"
            results.append(compare(title, ("locally", ours), (name, theirs), rounds=3))
    smooth = attr.NoiseTunnel(attr.Saliency(model))
    results.append(
        compare(
            f"smoothgrad, 4 points x 23 features x {SAMPLES}",
            ("locally", lambda: explain(model, points, "smoothgrad", n_samples=SAMPLES)),
            (
                "captum",
                lambda: smooth.attribute(points, target=0, nt_samples=SAMPLES, stdevs=0.1, abs=False),
            ),
            rounds=5,
        )
    )
    results += errors(lime, shap)
    results.append(growth("all eight methods", "locally, over points", [25, 50, 100, 200], over_points))
    results.append(growth("kernel_shap", "locally, over features", [25, 50, 100, 200], over_features))
    results.append(growth("lime", "locally, over samples", [500, 1000, 2000, 4000], over_samples))
    for result in results:
        print(result)
    return results


def errors(lime, shap) -> list[Comparison]:
    """Root mean square error to the enumerated values, over points and seeds, at 200 evaluations a point."""
    model, points = network(12), torch.rand(5, 12, generator=torch.Generator().manual_seed(1))
    results = []
    for method, peer in (("lime", lime), ("kernel_shap", shap)):
        options = {"convention": "captum"} if method == "lime" else {}
        exact = explain(model, points, method, n_samples=4096, exact=True, **options).attributions
        ratios, sizes = [], []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            found = explain(model, points, method, n_samples=200, generator=generator, **options)
            torch.manual_seed(seed)
            theirs = peer(model, points, 200, perturbations_per_eval=200)
            ours, other = (float((a - exact).square().mean().sqrt()) for a in (found.attributions, theirs))
            ratios.append(ours / other)
            sizes.append((ours, other))
        detail = {"ours": statistics.median(o for o, _ in sizes), "peer": statistics.median(p for _, p in sizes)}
        results.append(
            Comparison(
                f"{method}, 5 points x 12 features x 200",
                "error to exact",
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                "locally",
                "captum",
                detail,
            )
        )
    return results


def over_points(count: int):
    model, points = network(23), torch.rand(count, 23)
    return lambda: [explain(model, points, m, n_samples=SAMPLES) for m in Method]


def over_features(d: int):
    model, points = network(d), torch.rand(20, d)
    return lambda: explain(model, points, "kernel_shap", n_samples=SAMPLES)


def over_samples(n: int):
    model, points = network(23), torch.rand(20, 23)
    return lambda: explain(model, points, "lime", n_samples=n)


def network(d: int) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(d, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)]
    for layer in layers[::2]:
        layer.weight.data *= 3  # as after training: far from linear
    return torch.nn.Sequential(*layers, torch.nn.Sigmoid())


if __name__ == "__main__":
    main()
