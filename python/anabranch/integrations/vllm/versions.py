"""The versions of vLLM that the backend was tested with, and what is said of others."""

from __future__ import annotations

import os

#: the one place where they are named; `make test-servers` runs the tests with the last
TESTED = ("0.32.0",)
#: set to 1: any version is tried, at one's own risk
VARIABLE = "ANABRANCH_VLLM_UNTESTED"


def refusal(version: str) -> str | None:
    """Why a version of vLLM is not taken, with the remedy; None where it is.

    version: as ``vllm.__version__``; what stands behind a "+" (the kind of build) does not count.
    """
    if version.partition("+")[0] in TESTED or os.environ.get(VARIABLE) == "1":
        return None
    return (
        f"anabranch's attention backend was tested with vLLM {' and '.join(TESTED)}, this is {version}, and what it "
        f"rests on changes between versions; install vllm=={TESTED[-1]}, leave out --attention-backend CUSTOM, or set "
        f"{VARIABLE}=1 to try it nevertheless and compare its answers with those of another backend"
    )
