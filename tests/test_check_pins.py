"""scripts/dev/check_pins.py without a network: the error lines, the environment markers and the pins themselves."""

import os
import runpy
import sys

import pytest
from paths import ROOT

check_pins = runpy.run_path(str(ROOT / "scripts/dev/check_pins.py"))

CONTRADICTION = """\
Collecting torch>=2.8
ERROR: Cannot install torch==2.13.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    torch 2.13.0 depends on triton==3.7.1; platform_system == "Linux"
    The user requested (constraint) triton==3.9.0

To fix this you could try to:
1. loosen the range of package versions you've specified

ERROR: ResolutionImpossible: for help visit a page
"""

ABSENT = """\
ERROR: Could not find a version that satisfies the requirement numpy==2.4.6 (from versions: 2.2.5, 2.2.6)
ERROR: No matching distribution found for numpy==2.4.6
"""


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            CONTRADICTION,
            'torch 2.13.0 depends on triton==3.7.1; platform_system == "Linux"; '
            "The user requested (constraint) triton==3.9.0",
        ),
        (ABSENT, "No matching distribution found for numpy==2.4.6"),
        ("Killed\n", "pip failed: Killed"),
    ],
)
def test_conflict_returns_one_line_with_the_cause(output, line):
    assert check_pins["conflict"](output) == line


def test_marker_environment_equals_that_of_this_machine():
    if sys.platform != "linux":
        pytest.skip("compares the markers of Linux")
    from packaging.markers import default_environment

    here = default_environment()
    there = check_pins["marker_environment"](here["python_version"], f"Linux {os.uname().machine}")
    depend_on_the_release = {"platform_release", "platform_version", "python_full_version", "implementation_version"}
    assert there.keys() == here.keys()
    assert {name: there[name] for name in there.keys() - depend_on_the_release} == {
        name: here[name] for name in here.keys() - depend_on_the_release
    }


def test_every_line_of_the_constraints_pins_one_version():
    import packaging.requirements

    for line in check_pins["pins"]():
        (pin,) = packaging.requirements.Requirement(line).specifier
        assert pin.operator == "==", line
        assert "*" not in pin.version, line
