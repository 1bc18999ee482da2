"""Seattle's weather in a picture: what the last line shows comes back as an image. The data: ../data/README.md.

To run it: python sandbox_runner.py --mount tests/data:/data tests/examples/weather_plot.py
"""

import sys

import matplotlib.pyplot as plt
import pandas as pd

days = pd.read_csv(sys.argv[1] if len(sys.argv) > 1 else "/data/seattle-weather.csv", parse_dates=["date"])
years = days["date"].dt.year.nunique()
months = days.groupby(days["date"].dt.month).agg(
    low=("temp_min", "mean"), high=("temp_max", "mean"), rain=("precipitation", "sum")
)
months["rain"] /= years

figure, rain = plt.subplots(figsize=(8, 4.5), layout="constrained")
temperature = rain.twinx()
rain.bar(months.index, months["rain"], color="tab:blue", alpha=0.3)
rain.set_ylabel("rain, mm a month")
temperature.fill_between(months.index, months["low"], months["high"], color="tab:orange", alpha=0.4)
temperature.plot(months.index, months["high"], color="tab:red", label="mean daily high")
temperature.plot(months.index, months["low"], color="tab:purple", label="mean daily low")
temperature.set_ylabel("°C")
temperature.set_xticks(months.index, "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
temperature.set_title(f"Seattle, {days['date'].min():%Y} to {days['date'].max():%Y}")
temperature.legend(loc="upper left")
# No savefig() and no show(): figures that are open at the end are part of the result.

print(months.round(1).rename_axis("month").to_string())
