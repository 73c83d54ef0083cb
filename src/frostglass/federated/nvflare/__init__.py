"""NVFlare: filters that defend, judge and record updates. Needs `pip install 'frostglass[nvflare]'`.

`DefenceFilter` and `GateFilter` belong into a client's result filters, `RecordFilter` into the server's. NVFlare builds
components anew from class path and constructor arguments, so all arguments are numbers, texts, lists and tables. Tell
the job to leave this package where it is installed: `job.set_app_packages(["frostglass"])`.
"""

from frostglass.federated.nvflare.availability import require_nvflare

require_nvflare()
