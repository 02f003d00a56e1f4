#!/usr/bin/env python3
"""Check that the pins in constraints.txt can be installed, for every supported Python and platform.

    scripts/dev/check_pins.py

The script resolves the requirements of pyproject.toml under these constraints against the package index. This takes
some minutes and downloads pip and the metadata of about 110 packages.

The script prints one line for each combination of Python and platform: "ok" or the conflict. Each package of a
resolution must be pinned, except the CUDA packages, whose versions follow from the build of torch. Each pin must be
used by at least one combination. Otherwise the script exits with 1.

pip runs as on a machine that was never configured: without configuration files, and without the wheels, indexes and
constraints that environment variables would add. PIP_INDEX_URL is kept, so that a mirror of the index can be used.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"

PYTHONS = ("3.10", "3.11", "3.12", "3.13")

GLIBC_TAGS = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 29))]
"""Tags up to glibc 2.28, the oldest that the wheels of torch run on."""

PLATFORMS = {
    "Linux x86_64": [f"{tag}_x86_64" for tag in GLIBC_TAGS],
    "Linux aarch64": [f"{tag}_aarch64" for tag in GLIBC_TAGS],
    "macOS arm64": ["macosx_14_0_arm64"],
}
"""Name of a platform -> the tags of wheels that pip may install there."""

KEPT_PIP_VARIABLES = {"PIP_INDEX_URL", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TIMEOUT", "PIP_DEFAULT_TIMEOUT"}
"""Variables of pip that say how to reach the index. The other variables would change the result of a resolution."""

CUDA_PACKAGES = ("nvidia-", "cuda-")


def main() -> int:
    """Print one line for each combination and return the exit code."""
    problems = 0
    used: set[str] = set()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {name: os.environ[name] for name in KEPT_PIP_VARIABLES & os.environ.keys()}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", pin_of_pip()], check=True, env=environment)
        for version in PYTHONS:
            for platform in PLATFORMS:
                command = [python, __file__, version, platform]
                done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
                resolution = json.loads(done.stdout)
                used.update(resolution["packages"])
                problems += bool(resolution["problem"])
                outcome = resolution["problem"] or f"ok, {len(resolution['packages'])} packages"
                print(f"Python {version:5} {platform:14} {outcome}", flush=True)
    if not problems and (unused := pinned_names() - used - {"pip"}):
        problems += 1
        print(f"constraints.txt: no combination needs {', '.join(sorted(unused))}; remove the lines")
    return min(problems, 1)


def pins() -> list[str]:
    """Return the requirements in constraints.txt, with their markers."""
    return [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]


def pinned_names() -> set[str]:
    """Return the normalized names of all pinned packages."""
    return {normalized(re.split("[=; ]", line)[0]) for line in pins()}


def pin_of_pip() -> str:
    """Return the requirement of the pip that scripts/setup installs."""
    return next(line for line in pins() if line.startswith("pip=="))


def normalized(name: str) -> str:
    """Return the name in the form in which package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(version: str, platform: str) -> dict[str, object]:
    """Resolve one combination; return its "packages" (normalized names) and its "problem" (one line, or "").

    It runs in the temporary environment of the pinned pip.
    """
    from pip._internal.cli.main import main as run_pip
    from pip._vendor import tomli
    from pip._vendor.packaging import markers
    from pip._vendor.packaging.requirements import Requirement

    # With the options below, pip selects wheels for another Python and platform, but it evaluates markers such as
    # `; python_version < "3.11"` for the Python that runs it.
    environment = marker_environment(version, platform)
    setattr(markers, "default_environment", lambda: dict(environment))  # noqa: B010

    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        arguments = ["install", "--dry-run", "--ignore-installed", "--report", str(report), "--target", folder]
        # If the index does not offer the metadata of a wheel by itself, download only those bytes of the wheel.
        arguments += ["--use-feature", "fast-deps"]
        arguments += ["--only-binary", ":all:", "--python-version", version, "--implementation", "cp"]
        arguments += [argument for tag in PLATFORMS[platform] for argument in ("--platform", tag)]
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = run_pip([*arguments, "--constraint", str(CONSTRAINTS), *requirements])
        if status != 0:
            return {"packages": [], "problem": conflict(output.getvalue())}
        installed = json.loads(report.read_text())["install"]
    packages = sorted(normalized(item["metadata"]["name"]) for item in installed)
    applicable = [pin for pin in map(Requirement, pins()) if pin.marker is None or pin.marker.evaluate()]
    pinned = {normalized(pin.name) for pin in applicable}
    missing = [name for name in packages if name not in pinned and not name.startswith(CUDA_PACKAGES)]
    return {"packages": packages, "problem": f"not pinned: {', '.join(missing)}" if missing else ""}


def marker_environment(version: str, platform: str) -> dict[str, str]:
    """Return the variables that environment markers can use."""
    system, machine = platform.split()
    full_version = f"{version}.9"
    return {
        "implementation_name": "cpython",
        "implementation_version": full_version,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": {"macOS": "Darwin"}.get(system, system),
        "platform_version": "",
        "python_full_version": full_version,
        "python_version": version,
        "sys_platform": {"macOS": "darwin", "Linux": "linux"}[system],
    }


def conflict(output: str) -> str:
    """Return one line for the output of a failed pip: the requirements in conflict, or its last error."""
    lines = [line.strip() for line in output.splitlines()]
    if "The conflict is caused by:" in lines:
        start = lines.index("The conflict is caused by:") + 1
        end = lines.index("", start) if "" in lines[start:] else len(lines)
        return "; ".join(lines[start:end])
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else "pip failed: " + " ".join(lines[-3:])


if __name__ == "__main__":
    if len(sys.argv) == 3:  # the call of `main` for one combination
        print(json.dumps(resolve(*sys.argv[1:])))
    else:
        argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
        sys.exit(main())
