"""What the package promises exists and says what it is."""

import importlib
import inspect

import pytest

from checkout import PACKAGE, module_name, project_files

package = importlib.import_module(PACKAGE)
LIBRARY_MODULES = [module_name(name) for name in project_files() if name.suffix == ".py" and name.parts[0] == PACKAGE]


def undocumented(value: object) -> list[str]:
    """The names, of an object and of what its class adds itself, that have no docstring of their own."""
    if inspect.isroutine(value):
        return [] if value.__doc__ else [value.__name__]
    if not inspect.isclass(value):
        return []
    methods = [
        member
        for name, member in vars(value).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
    ]
    # `getdoc` of a method may answer with the base's, which is right; that of a class must be its own.
    bare = [member for member in methods if not member.__doc__ and not _documented_above(value, member)]
    return [value.__name__] * (not vars(value).get("__doc__")) + [str(member) for member in bare]


def _documented_above(cls: type, member: object) -> bool:
    name = member.fget.__name__ if isinstance(member, property) else member.__name__
    return any(getattr(vars(base).get(name), "__doc__", None) for base in cls.__mro__[1:])


def test_the_optimizer_is_public():
    assert "AdamMini" in package.__all__


@pytest.mark.parametrize("name", getattr(package, "__all__", ["AdamMini"]))
def test_public_names_resolve_and_are_documented(name):
    value = getattr(package, name)
    assert name in dir(package)
    if getattr(value, "__module__", "").startswith(PACKAGE):
        assert undocumented(value) == []


@pytest.mark.parametrize("module", LIBRARY_MODULES)
def test_every_library_module_imports(module):
    try:
        importlib.import_module(module)
    except ImportError as error:
        framework = module.rpartition(".")[2] if ".integrations." in module else "triton"
        if framework not in str(error):
            raise
        pytest.skip(f"{framework} is not installed")


def test_unknown_names_raise_attribute_errors():
    with pytest.raises(AttributeError):
        getattr(package, "no_such_name")  # noqa: B009


def test_the_guard_finds_missing_docstrings():
    class Documented:
        """Of the class."""

        def said(self):
            """Of the method."""

    class Silent(Documented):
        def said(self):
            pass

        def unsaid(self):
            pass

    assert undocumented(Documented) == []
    silent, unsaid = undocumented(Silent)
    assert silent == "Silent"
    assert "unsaid" in unsaid
