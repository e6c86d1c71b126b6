"""Where a decoding step's time goes, and the least that this machine could need for it.

    python benchmarks/profile_generate.py [--quick] [--batch 8 32] [--new-tokens 64]

Two bounds stand beside the measured time of a token: reading every weight once at the speed of a
plain sum over them, and the step's multiplications at the speed of a large dot. The shares are
those of the summed times of XLA's operations within the sampler's loop.
"""

from __future__ import annotations

import collections
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import arguments, report, write
from task import FULL, QUICK, Size

PROMPT = 64
SHARES = ("weights' dots", "attention", "cache writes", "sampling", "rest")


def best(run: Callable[[], Any], rounds: int) -> float:
    import jax

    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begun)
    return min(times)


def kind_of(shape: str, operation: str, size: Size) -> str:
    """Which share an operation of the loop belongs to."""
    if "bnme,bnet" in operation or "bnmt,bnte" in operation:
        return "attention"
    if operation.endswith("dot_general"):
        return "weights' dots"
    if "dynamic_update_slice" in operation:
        return "cache writes"
    if str(size.vocab) in re.findall(r"\d+", shape):
        return "sampling"
    return "rest"


def shares(run: Callable[[], Any], program: str, size: Size) -> dict[str, float]:
    """Share of each kind in the summed time of the loop's operations."""
    import jax

    kinds = {}
    for line in program.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\S+) .*op_name=\"([^\"]*)\"", line)
        if found and "while/body" in found[3] and "closed_call" not in found[3]:
            kinds[found[1]] = kind_of(found[2], found[3], size)
    sums: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        traces = list(Path(directory).rglob("*.xplane.pb"))
        for plane in jax.profiler.ProfileData.from_file(str(traces[0])).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in kinds:
                        sums[kinds[event.name]] += event.duration_ns
    whole = sum(sums.values())
    return {name: sums[name] / whole for name in SHARES}


def bounds(net: Any, params: Any, rows: int, rounds: int) -> tuple[float, float]:
    """Seconds to read the weights once, and for a step's multiplications in a large dot."""
    import jax
    import jax.numpy as jnp

    dtype, count = net.spec.dtype, sum(x.size for x in jax.tree.leaves(params))
    light = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p))(params)
    total = jax.jit(lambda p: sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(p)))
    read = best(lambda: total(light), rounds)
    side = 2048
    square = jnp.ones((side, side), dtype)
    dot = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    return read, best(lambda: dot(square), rounds) / (2 * side**3) * (2 * rows * count)


def look(size: Size, *, rows: int, new_tokens: int, dtype: str, rounds: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jrlhf.models.build import Net
    from jrlhf.models.spec import DecoderSpec
    from jrlhf.rollout.engine import row_keys
    from jrlhf.rollout.sampling import SamplingParams, sample

    spec = DecoderSpec(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.ffn,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.hidden // size.heads,
        tie_word_embeddings=True, dtype=dtype,
    )  # fmt: skip
    net = Net(spec)
    params = jax.jit(net.init)(jax.random.key(0))
    ids, lengths = jnp.ones((rows, PROMPT), jnp.int32), jnp.full(rows, PROMPT, jnp.int32)
    keys = row_keys(np.uint32(0), np.uint32(0), np.uint32(0), np.arange(rows, dtype=np.uint32))
    sampling = SamplingParams(max_new_tokens=new_tokens)

    def run(limit: int) -> Any:
        return sample(net, params, ids, lengths, keys, sampling, np.int32(limit))

    whole, first = best(lambda: run(new_tokens), rounds), best(lambda: run(1), rounds)
    read, multiply = bounds(net, params, rows, rounds)
    program = sample.lower(net, params, ids, lengths, keys, sampling, np.int32(1)).compile()
    found = shares(lambda: run(new_tokens), program.as_text(), size)
    return {
        "dtype": dtype,
        "batch": rows,
        "prompt + 1 token, s": first,
        "later token, ms": 1e3 * (whole - first) / (new_tokens - 1),
        "reading weights, ms": 1e3 * read,
        "multiplying, ms": 1e3 * multiply,
        **{name: f"{share:.0%}" for name, share in found.items()},
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], alone=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    options.rounds = options.rounds or (2 if options.quick else 5)
    results = [
        look(size, rows=rows, new_tokens=options.new_tokens, dtype=dtype, rounds=options.rounds)
        for dtype in options.dtype
        for rows in options.batch
    ]
    report("a decoding step", results)
    write("profile_generate", options, results, size=vars(size))


if __name__ == "__main__":
    main()
