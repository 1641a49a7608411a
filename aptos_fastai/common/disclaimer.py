"What every command, page and document that shows grades says."
DISCLAIMER = 'Research use only. Not a medical device. Does not grade macular oedema.'
