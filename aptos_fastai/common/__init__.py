"Files, console and processes: knows no images, grades or stages."
