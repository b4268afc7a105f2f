"""The paper's laboratory: experiments that run on a CPU in minutes and write pictures and tables."""
