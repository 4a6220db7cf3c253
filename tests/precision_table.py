"""Print the largest relative errors of the fp32 loss as a markdown table: ``python tests/precision_table.py``.

The rows and the 40-digit reference are those of ``test_functional.py``. Every error is that of one sample against its
own norm, the largest over samples and logit scales from 1 to 1e4.
"""

import torch
from test_functional import BETAS, SCENARIOS, largest_errors, ours, textbook


def main():
    torch.set_num_threads(1)  # the tensors are tiny
    print("| logits | beta | value | gradient | value, textbook | gradient, textbook |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for scenario in SCENARIOS:
        for beta in BETAS:
            errors = *largest_errors(ours, scenario, beta), *largest_errors(textbook, scenario, beta)
            worst = max(worst, *errors[:2])
            print(f"| {scenario} | {beta:.0e} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")
    print(f"\nLargest error: {worst:.1e}. Textbook: `CE + log(1 - p + beta p)` from `F.cross_entropy` in fp32.")


if __name__ == "__main__":
    main()
