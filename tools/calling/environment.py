"""Reads a class as an environment: its public methods are tools, a few names are hooks.

A class with `__call__` is one tool. A class without is an environment: each public method is a tool
with the method's name, types and docstring, but for these, which the loop calls itself:

    opening(self)             text or images behind the prompt's last message
    user(self, trajectory)    what the user says behind an answer; None: the end
    reward(self, trajectory)  a number for the final state, or None; the reward "environment"
    metrics(self)             {name: number} of the final state, logged as environment_<name>
    close(self)               gives back what it holds

All of them may be `async def`.
"""

import inspect
from collections.abc import Callable

from run.config import UserError

# The hooks, each with what it is given beside the state.
HOOKS = {"opening": (), "user": ("trajectory",), "reward": ("trajectory",), "metrics": ()}
CLOSE = "close"
# What says more of a tool, and nothing of an environment or its methods.
IDLE_MARKS = ("pure", "shared", "sees", "takes_images", "prepare", "describe")


def is_environment(target) -> bool:
    """Says whether it is a class without `__call__` that has a tool or a hook. UserError for one
    with `__call__`, which is a tool, if it also has a hook: that would never be called."""
    if not inspect.isclass(target):
        return False
    members = _members(target)
    if "__call__" not in members:
        public = [name for name in members if not name.startswith("_") and name != CLOSE]
        return any(inspect.isfunction(members[name]) for name in public)
    for hook in HOOKS:
        if inspect.isfunction(members.get(hook)):
            raise UserError(
                f"class {target.__name__} has __call__, so it is one tool, and its {hook} would "
                f"never be called: without __call__ it is an environment; or rename {hook}"
            )
    return False


def hooks_of(target: type) -> dict[str, Callable]:
    """Finds the hooks of an environment. UserError for one that cannot be called as it will be."""
    members = _members(target)
    hooks = {}
    for name, given in (*HOOKS.items(), (CLOSE, ())):
        if name not in members:
            continue
        wanted = f"{name}({', '.join(('self', *given))})"
        method = members[name]
        if not inspect.isfunction(method):
            raise UserError(f"{target.__name__}.{name} is no method: write def {wanted}, or rename")
        try:
            inspect.signature(method).bind(None, *given)
        except TypeError:
            found = f"{name}{inspect.signature(method)}"
            raise UserError(
                f"{target.__name__}.{found} is called as {wanted}: write that"
            ) from None
        if name in HOOKS:
            hooks[name] = method
    return hooks


def tools_of(target: type) -> dict[str, Callable]:
    """Finds the methods of an environment that are tools, in the order in which they stand.
    UserError for a static method or one of the class, and for a mark that says nothing here."""
    class_name = target.__name__
    methods = {}
    for name, member in _members(target).items():
        if name.startswith("_") or name in HOOKS or name == CLOSE:
            continue
        if isinstance(member, staticmethod | classmethod):
            why = "is no method of an instance, so it cannot be a tool"
            raise UserError(f"{class_name}.{name} {why}: begin its name with _")
        if inspect.isfunction(member):
            _refuse_marks(member, f"{class_name}.{name}", IDLE_MARKS)
            methods[name] = member
    # a method of the name of a mark is a tool like any other
    marks = [mark for mark in (*IDLE_MARKS, "ends", "network") if mark not in methods]
    _refuse_marks(target, class_name, marks)
    return methods


def _refuse_marks(target, name, marks):
    for mark in marks:
        if getattr(target, mark, False):
            what = "a mark of tools that says nothing of an environment"
            if mark in ("ends", "network"):
                what = "the mark of a method, not of the class"
            raise UserError(f"{name}.{mark} has no effect: it is {what}, so drop it")


def _members(target):
    """Collects {name: what the class has by it}, as written: bases first, without object's."""
    members = {}
    for base in reversed(target.__mro__[:-1]):
        members |= vars(base)
    return members
