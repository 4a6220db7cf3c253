"""Print the largest relative errors of the fp32 loss as markdown tables: ``python tests/precision_table.py``.

First over all decades of beta (the README's table), then decade by decade. The rows and the 40-digit reference are
those of ``test_functional.py``. Every error is that of one sample against its own norm, the largest over samples and
logit scales from 1 to 1e4.
"""

import torch
from test_functional import BETAS, SCENARIOS, largest_errors, ours, textbook

COLUMNS = "value | gradient | value, textbook | gradient, textbook |"


def line(*names, errors):
    print("| " + " | ".join(names) + " | " + " | ".join(f"{error:.0e}" for error in errors) + " |")


def main():
    torch.set_num_threads(1)  # the tensors are tiny
    errors = {
        (scenario, beta): (*largest_errors(ours, scenario, beta), *largest_errors(textbook, scenario, beta))
        for scenario in SCENARIOS
        for beta in BETAS
    }
    print(f"| logits | {COLUMNS}\n|---|---|---|---|---|")
    for scenario in SCENARIOS:
        worst = [max(column) for column in zip(*(errors[scenario, beta] for beta in BETAS), strict=True)]
        line(scenario, errors=worst)
    print("\nTextbook: `CE + log(1 - p + beta p)` from `F.cross_entropy` in fp32.\n")
    print(f"| logits | beta | {COLUMNS}\n|---|---|---|---|---|---|")
    for (scenario, beta), row in errors.items():
        line(scenario, f"{beta:.0e}", errors=row)


if __name__ == "__main__":
    main()
