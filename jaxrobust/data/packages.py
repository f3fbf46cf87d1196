"""Optional packages: find their files without importing them, or say which command brings them."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType


def _missing(module: str, package: str, purpose: str) -> ImportError:
    return ImportError(f"{purpose} needs the package {package}: pip install {package}", name=module)


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Imports an optional module, or raises with the command that installs it.

    Args:
        module: dotted name to import, "PIL.Image".
        package: name under which pip installs it, "pillow".
        purpose: what needs it; begins the error message.

    Returns:
        The imported module.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, package, purpose) from error


def package_file(module: str, package: str, path: str, purpose: str) -> Path:
    """The path of a data file inside an installed package, which is not imported.

    Importing scikit-learn or foolbox costs seconds and, for foolbox, whatever it finds installed.

    Args:
        module: top-level module name, "sklearn".
        package: name under which pip installs it, "scikit-learn".
        path: file or folder inside the module's folder.
        purpose: what needs it; begins the error message.

    Returns:
        The existing path.

    Raises:
        ImportError: the package is not installed.
        FileNotFoundError: the package is installed, the file is not in it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(module, package, purpose)
    found = Path(spec.submodule_search_locations[0]) / path
    if not found.exists():
        raise FileNotFoundError(
            f"{purpose} needs {path} of the package {package}, which this version lacks: "
            f"pip install --upgrade --force-reinstall {package}"
        )
    return found
