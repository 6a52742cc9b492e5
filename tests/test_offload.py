from expect import parametrize

from atp_tune.checkpoints.files import Free, choose, hessian_bytes, states

GB = 10**9


@parametrize(
    ("total", "blocks", "free", "work", "where"),
    [
        (70, 60, Free(100, 0), 20, "none"),
        (70, 60, Free(100, 100), 21, "cpu"),  # with the hidden states and a Hessian it does not fit
        (71, 60, Free(100, 100), 0, "cpu"),
        (71, 70, Free(100, 100), 0, "cpu"),
        (80, 71, Free(100, 100), 0, "disk"),
        (138 * GB, 137 * GB, Free(80 * GB, 153 * GB), 0, "cpu"),  # of much memory the system needs no third
        (138 * GB, 137 * GB, Free(80 * GB, 152 * GB), 0, "disk"),
        (10**6, 10**6, Free(0, 0, bounded=False), 10**6, "none"),
    ],
)
def test_the_first_place_where_they_fit(total: int, blocks: int, free: Free, work: int, where: str) -> None:
    assert choose(total, blocks, free, work) == where


@parametrize(
    ("model", "inputs", "where"),
    [("Llama-2-7B", 11008, "none"), ("Llama-3-8B", 14336, "cpu")],
)
def test_sparsegpt_on_a_card_of_24_gb(model: str, inputs: int, where: str) -> None:
    """128 × 2048 tokens to calibrate and WikiText-2's to measure: 8B on the card as a whole left no room to prune."""
    total, state = {"Llama-2-7B": 13_476_839_424, "Llama-3-8B": 16_060_522_496}[model], 4096 * 2
    work = states(128 * 2048 * state, 147 * 2048 * state) + hessian_bytes(inputs)
    assert choose(total, total - 2 * GB, Free(25_300 * 10**6, 64 * GB), work) == where
