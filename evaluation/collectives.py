"""What the collectives of a pass cost by themselves, for benchmark.py under torchrun."""
import torch
import torch.distributed as dist

from load import dtype_name
from model import ModelConfig
from ranks import all_reduce, job
from tp import columns_of_all_ranks


def measure(args, config: ModelConfig, verify: list[dict]) -> dict | None:
    """Milliseconds of an all-reduce and of the gather of the logits, and what share of a pass of
    one row and of the largest K + 1 they are. verify: passes with their `rows` and `ms`.
    """
    if job.world() == 1:
        return None
    calls = 2 * config.n_layer + 1  # after attention, feed-forward and embedding
    ms_of = lambda call: 1e3 * all_reduce.seconds_of(call, args.device, recorded=args.compile)
    passes, times = [], {v["rows"]: v["ms"] for v in verify}
    for rows in (1, max(args.speculate_k) + 1):
        made = dict(dtype=args.dtype, device=args.device)
        x = torch.ones(rows, config.dim, **made)
        logits = torch.ones(rows, config.vocab_size // job.world(), **made)
        reduce_ms = ms_of(lambda x=x: all_reduce.sum_over_ranks(x))
        gather_ms = ms_of(lambda logits=logits: columns_of_all_ranks(logits))
        how = "one-shot" if all_reduce.in_one_shot(x) else dist.get_backend(job.passes)
        passes.append({"rows": rows, "all_reduce": how, "all_reduce_ms": reduce_ms,
                       "gather_ms": gather_ms,
                       "share_of_pass": (calls * reduce_ms + gather_ms) / times[rows]})
    return {"dim": config.dim, "dtype": dtype_name(args.dtype), "all_reduces_a_pass": calls,
            "passes": passes}
