"""DiaBlo in Hugging Face PEFT: importing this registers it, and PEFT then trains and loads this project's adapters.

    from peft import get_peft_model
    from diablo_export.peft import DiabloConfig

    model = get_peft_model(base, DiabloConfig(num_blocks=64, target_modules=["q_proj", "v_proj"]))

`PeftModel.from_pretrained` and `AutoPeftModelFor…` need this package imported first: PEFT looks for no plug-ins.
"""

from __future__ import annotations

from typing import Any

from diablo_export.errors import DependencyError, require

require("peft", "peft")  # before the imports below, to say how to install it

from peft import mapping  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner  # noqa: E402

if not hasattr(BaseTuner, "_get_adapter_state_dict"):
    raise DependencyError(
        "this needs PEFT 0.21 or newer: older ones refuse to save methods that are not their own; "
        'install it with: pip install "diablo-export[peft]"'
    )

from diablo_export.peft.config import DiabloConfig, DiabloPeftError, DiabloType  # noqa: E402
from diablo_export.peft.layer import DiabloLayer  # noqa: E402
from diablo_export.peft.model import DiabloModel  # noqa: E402

__all__ = ["DiabloConfig", "DiabloLayer", "DiabloModel", "DiabloPeftError"]

# not by peft.utils.register_peft_method: it takes only the names in PEFT's own enumeration
_DIABLO: Any = DiabloType.DIABLO
mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_DIABLO] = DiabloConfig
mapping.PEFT_TYPE_TO_TUNER_MAPPING[_DIABLO] = DiabloModel
mapping.PEFT_TYPE_TO_PREFIX_MAPPING[_DIABLO] = DiabloModel.prefix
