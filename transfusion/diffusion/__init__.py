"""The mathematics of diffusion: schedule (alpha, sigma), objective (what is predicted), solver (one step), guidance."""
