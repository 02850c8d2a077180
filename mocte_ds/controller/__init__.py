"""What happens at a check: measure, decide, agree, act, report."""

from mocte_ds.controller.controller import Controller

__all__ = ["Controller"]
