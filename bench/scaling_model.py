"""Prints docs/scaling.md's predictions: a step's time on several GPUs from what one GPU was measured to take.

python -m bench.scaling_model
"""

GRADIENT_BYTES = 859_520_964 * 2  # fp16
FIRST_BUCKET_SHARE = 0.1  # of the backward pass is over before the first bucket of gradients is full
DDP_MS = 4.5  # measured: 26.6 ms with DDP's reducer in the graph, 22.1 ms without, one H100
# Bytes a second in one direction through the slowest link of the ring; achieved, taken as 80% of nominal.
LINKS = {"NVLink": 0.8 * 450e9, "PCIe 4.0 x16": 0.8 * 31.5e9, "100 Gb/s": 0.8 * 12.5e9, "25 Gb/s": 0.8 * 3.125e9}
GPUS = (1, 2, 4, 8, 16, 32, 64)
# Batch a GPU: (whole step, forward + backward) in ms, measured on one H200.
MEASURED = {1: (23.0, 17.2), 8: (66.9, 60.5)}


def all_reduce_ms(num_gpus: int, bytes_a_second: float) -> float:
    """A ring's: every link carries each gradient out and back, less one part in num_gpus."""
    return 2 * (num_gpus - 1) / num_gpus * GRADIENT_BYTES / bytes_a_second * 1e3


def step_ms(batch: int, num_gpus: int, bytes_a_second: float, num_micro_batches: int = 1) -> float:
    """Only the last micro-batch's backward pass, two thirds of its time, has communication to hide."""
    step, compute = MEASURED[batch]
    alone = step + (num_micro_batches - 1) * compute
    if num_gpus == 1:
        return alone
    hidden = (1 - FIRST_BUCKET_SHARE) * compute * 2 / 3
    return alone + DDP_MS + max(0.0, all_reduce_ms(num_gpus, bytes_a_second) - hidden)


def main() -> None:
    for batch in MEASURED:
        for num_micro_batches in (1, 8):
            print(f"\nbatch {batch} a GPU, {num_micro_batches} micro-batches: ms a step (efficiency)\n")
            print("| link | " + " | ".join(f"{gpus} GPU" for gpus in GPUS) + " |\n|" + "---|" * (len(GPUS) + 1))
            for name, speed in LINKS.items():
                times = [step_ms(batch, gpus, speed, num_micro_batches) for gpus in GPUS]
                print(f"| {name} | " + " | ".join(f"{time:.0f} ({times[0] / time:.0%})" for time in times) + " |")


if __name__ == "__main__":
    main()
