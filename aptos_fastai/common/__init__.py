"Files, console and processes; nothing here depends on images, grades or stages."
