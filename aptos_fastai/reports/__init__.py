"HTML reports of runs and tables."
