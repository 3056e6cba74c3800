"""Systems that call sub-threads with a context of their own, in plain text: no special token is needed."""

from anabranch.strategies.calls.apr import APR
from anabranch.strategies.calls.asyncthink import AsyncThink
from anabranch.strategies.calls.leap import LeaP
from anabranch.strategies.calls.pacore import PaCoRe
from anabranch.strategies.calls.running_summary import RunningSummary
from anabranch.strategies.calls.select_passages import SelectPassages

__all__ = ["APR", "AsyncThink", "LeaP", "PaCoRe", "RunningSummary", "SelectPassages"]
