"""What is said of many cases comes once."""

import warnings

from grcsf_fast.data import volumes
from grcsf_fast.datasets.case_warnings import case_warnings_counted, case_warnings_once


def said_of(name: str, text: str) -> None:
    """As the package warns of a case."""
    warnings.warn_explicit(f"{name}: {text}", UserWarning, volumes.__file__, 1)


def test_what_is_said_of_many_cases_comes_once():
    """Figures apart, with their number after all were read, and not again when the training reads them."""
    found = "found values from {} to {}: is this a CT?"
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with case_warnings_once():
            with case_warnings_counted():
                for number in range(12):
                    said_of(f"sub-{number}.nii.gz", found.format(-1000.5 - number, f"{number}e+03"))
                said_of("sub-3.nii.gz", "damaged elsewhere")
            said_of("sub-7.nii.gz", found.format(-3, 5))
            for number in range(2):
                said_of(f"sub-{number}.nii.gz", "new to us")
            for step in range(2):
                warnings.warn(f"step {step} is not saved: no space left", stacklevel=1)
        said_of("sub-7.nii.gz", found.format(-3, 5))
    assert [str(one.message) for one in shown] == [
        "sub-0.nii.gz: found values from -1000.5 to 0e+03: is this a CT? (and 11 more like it)",
        "sub-3.nii.gz: damaged elsewhere",
        "sub-0.nii.gz: new to us (others like it are not named)",
        "step 0 is not saved: no space left",
        "step 1 is not saved: no space left",
        "sub-7.nii.gz: found values from -3 to 5: is this a CT?",
    ]


def test_outside_of_a_training_every_warning_is_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with case_warnings_counted():
            for number in range(2):
                said_of(f"sub-{number}.nii.gz", "found 3 values")
    assert len(shown) == 2
