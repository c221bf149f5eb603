"""
The part of Transformers' own suite that finds faults within a minute. `python scripts/conformance.py` runs all of it.

Left out here are the comparisons of eager and sdpa attention over all dtypes, and what takes more than two processes.
"""

import re

from conformance import suite


def test_the_suite_is_installed():
    assert suite.FOLDER.is_dir(), (
        f"The tests of Transformers are not in {suite.FOLDER}: bash scripts/test.sh fetches them (once)."
    )


if suite.FOLDER.is_dir():
    from conformance import classes

    LEFT_OUT = re.compile(
        r"test_eager_matches_sdpa_inference_(?!08)|test_hsdp|test_fsdp2_(save_load_dcp|bf16|plan_vs_ddp_0)"
    )
    OTHER_RECIPES = ("Classic", "Relative", "Context", "Feeding")

    def fast_part(tests: type) -> type:
        left_out = {name: None for name in dir(tests) if LEFT_OUT.match(name)}
        return type(tests.__name__, (tests,), {**left_out, "__module__": __name__})

    globals().update(
        {
            name: fast_part(tests)
            for name, tests in vars(classes).items()
            if name.startswith("Test") and not name.endswith(OTHER_RECIPES)
        }
    )
