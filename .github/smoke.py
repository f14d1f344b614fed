"""Import the installed gap_ds and run the first code of a README: python smoke.py README.md"""

import re
import sys
from pathlib import Path

import gap_ds

assert "site-packages" in gap_ds.__file__, f"{gap_ds.__file__}: must be the installed wheel, not the checkout"
print(f"gap_ds {gap_ds.__version__}, {gap_ds.GaPConfig.load('cyclic_90').sparsity:.0%} by the shipped config cyclic_90")
first = re.search(r"^```python\n(.*?)^```$", Path(sys.argv[1]).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
assert first, f"{sys.argv[1]}: has no python code"
exec(compile(first[1], sys.argv[1], "exec"))
